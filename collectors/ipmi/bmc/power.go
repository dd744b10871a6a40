package bmc

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Statistics are readings of a meter since its statistics began. The unit is
// the meter's.
type Statistics struct {
	Current uint16        `json:"current"`
	Minimum uint16        `json:"minimum"`
	Maximum uint16        `json:"maximum"`
	Average uint16        `json:"average"`
	Time    uint32        `json:"time"` // by the controller's clock
	Period  time.Duration `json:"period"`
	Active  bool          `json:"active"` // it measures now
}

// dcmiGroup is DCMI's group extension (DCMI v1.5 §6, "Group Extension Identification").
const dcmiGroup = 0xdc

// DCMIPower asks for the machine's power in W: Get Power Reading, mode 1 (DCMI
// v1.5 §6.6.1).
func (b *BMC) DCMIPower(ctx context.Context) (Statistics, error) {
	r, err := b.command(ctx, Addr{}, netGroup, 0x02, 18, dcmiGroup, 1, 0, 0)
	if err != nil {
		return Statistics{}, fmt.Errorf("ask for the power by DCMI: %w", err)
	}
	if r[0] != dcmiGroup {
		return Statistics{}, fmt.Errorf("ask for the power by DCMI: %w: it is of the group %02xh", ErrReply, r[0])
	}
	// Its order differs from Node Manager's only in the period, which is in ms.
	s := statistics(r[1:])
	s.Period = time.Duration(le32(r[13:])) * time.Millisecond
	s.Active = r[17]&0x40 != 0
	return s, nil
}

func statistics(r []byte) Statistics {
	return Statistics{Current: le16(r), Minimum: le16(r[2:]), Maximum: le16(r[4:]), Average: le16(r[6:]), Time: le32(r[8:])}
}

// ErrNoNodeManager is returned where the machine has no Intel Node Manager.
var ErrNoNodeManager = errors.New("the machine has no Intel Node Manager")

// NodeManager is Intel's Node Manager: firmware of the Management Engine,
// reached over IPMB. NM 3.0 stands for Intel's Intelligent Power Node Manager
// 3.0 External Interface Specification Using IPMI (document 332200).
type NodeManager struct {
	Addr    Addr
	Version byte // 1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5, 5: 3.0 (NM 3.0, Get Node Manager Version)
}

// What Node Manager 3.0 added needs this version.
const nodeManager3 = 5

// Measurements of [BMC.NodeManagerStatistics]: modes of Get Node Manager
// Statistics (NM 3.0, command C8h), and the least version that has them.
type Measurement struct{ mode, version byte }

// The measurements that meters are made of.
var (
	NMPower   = Measurement{1, 1}            // W, of the whole machine
	NMInlet   = Measurement{2, 1}            // °C
	NMAirflow = Measurement{4, nodeManager3} // CFM
	NMOutlet  = Measurement{5, nodeManager3} // °C
)

// Has reports whether this Node Manager measures it.
func (n *NodeManager) Has(m Measurement) bool { return n.Version >= m.version }

// HasCUPS reports whether this Node Manager tells how busy the machine is.
func (n *NodeManager) HasCUPS() bool { return n.Version >= nodeManager3 }

// FindNodeManager looks for the record in which Node Manager says where it is
// (NM 3.0, OEM SDR: subtype 0Dh, version 01h, address, channel and LUN), and
// asks it which version it has.
func (b *BMC) FindNodeManager(ctx context.Context, records *Records) (*NodeManager, error) {
	for _, r := range records.OEM {
		if r.Manufacturer != IntelManufacturer || len(r.Data) < 4 || r.Data[0] != 0x0d || r.Data[1] != 0x01 {
			continue
		}
		n := &NodeManager{Addr: Addr{Slave: r.Data[2] &^ 1, Channel: r.Data[3] >> 4, LUN: r.Data[3] & 3}}
		d, err := b.DeviceID(ctx, n.Addr)
		if err != nil {
			return nil, fmt.Errorf("look for Node Manager: %w", err)
		}
		if d.Implemented == 0 {
			return nil, ErrNoNodeManager // the Management Engine runs without it
		}
		v, err := b.nodeManager(ctx, n.Addr, 0xca, 1)
		if err != nil {
			return nil, fmt.Errorf("ask Node Manager for its version: %w", err)
		}
		if n.Version = v[0]; n.Version == 0 {
			return nil, ErrNoNodeManager
		}
		return n, nil
	}
	return nil, ErrNoNodeManager
}

// nodeManager sends one of its commands, which begin with Intel's number as
// their answers do, and returns what follows.
func (b *BMC) nodeManager(ctx context.Context, to Addr, cmd byte, least int, data ...byte) ([]byte, error) {
	var request [16]byte
	request[0], request[1], request[2] = IntelManufacturer&0xff, IntelManufacturer>>8&0xff, IntelManufacturer>>16
	n := 3 + copy(request[3:], data)
	r, err := b.command(ctx, to, netOEM, cmd, 3+least, request[:n]...)
	if err != nil {
		return nil, err
	}
	if le24(r) != IntelManufacturer {
		return nil, fmt.Errorf("%w: it is of the manufacturer %06xh", ErrReply, le24(r))
	}
	return r[3:], nil
}

// NodeManagerStatistics asks for a measurement of the whole platform: Get Node
// Manager Statistics (NM 3.0, command C8h).
func (b *BMC) NodeManagerStatistics(ctx context.Context, n *NodeManager, m Measurement) (Statistics, error) {
	r, err := b.nodeManager(ctx, n.Addr, 0xc8, 17, m.mode, 0, 0)
	if err != nil {
		return Statistics{}, fmt.Errorf("ask Node Manager for statistics %02xh: %w", m.mode, err)
	}
	s := statistics(r)
	s.Period = time.Duration(le32(r[12:])) * time.Second
	s.Active = r[16]&0x40 != 0 // bit 6: measurements are in progress
	return s, nil
}

// CUPSIndex asks how busy the machine is, as one number: Get CUPS Data,
// parameter 1 (NM 3.0, command 65h).
func (b *BMC) CUPSIndex(ctx context.Context, n *NodeManager) (uint16, error) {
	r, err := b.nodeManager(ctx, n.Addr, 0x65, 2, 1)
	if err != nil {
		return 0, fmt.Errorf("ask Node Manager for the CUPS index: %w", err)
	}
	return le16(r), nil
}

// Utilization is how busy parts of the machine are, in percent.
type Utilization struct {
	CPU    uint64 `json:"cpu"`
	Memory uint64 `json:"memory"`
	IO     uint64 `json:"io"`
}

// CUPSUtilization asks how busy the parts are: Get CUPS Data, parameter 5 (NM
// 3.0, command 65h).
func (b *BMC) CUPSUtilization(ctx context.Context, n *NodeManager) (Utilization, error) {
	r, err := b.nodeManager(ctx, n.Addr, 0x65, 24, 5)
	if err != nil {
		return Utilization{}, fmt.Errorf("ask Node Manager for the utilization: %w", err)
	}
	return Utilization{le64(r), le64(r[8:]), le64(r[16:])}, nil
}

func le64(b []byte) uint64 { return uint64(le32(b)) | uint64(le32(b[4:]))<<32 }
