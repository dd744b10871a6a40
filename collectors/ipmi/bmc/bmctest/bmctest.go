// Package bmctest is a BMC for tests: it answers as a real one does, and can be
// told to fail in each way that real ones do.
package bmctest

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc"
)

// Sensor is a sensor's reading, as Get Sensor Reading answers it.
type Sensor struct {
	Raw        byte
	Off        bool   // scanning disabled
	Unknown    bool   // no reading at present
	States     uint16 // threshold comparison, or discrete states
	Thresholds [7]byte
	Fault      Fault
	Factors    map[byte][6]byte // of a sensor that is not linear, by raw reading
}

// Fault is a way to fail.
type Fault int

// The faults.
const (
	None     Fault = iota
	Silent         // no answer
	Busy           // completion code C0h
	Short          // an answer without its data
	Long           // an answer with more than it should have
	Garbage        // random bytes
	Refuse         // completion code CBh
	Empty          // an answer of no byte at all
	NotReady       // completion code D2h
)

// Me is a Management Engine with Node Manager, behind IPMB.
type Me struct {
	Addr    byte
	Channel byte
	Version byte
	Watts   uint16
	Inlet   uint16
	Outlet  uint16
	Airflow uint16
	CUPS    uint16
	Busy    bmc.Utilization
	Mute    bool // it does not answer
	Latency time.Duration
}

// BMC is a fake. Set it up before its first use, or change it by Do.
type BMC struct {
	mu sync.Mutex

	Records     [][]byte // sensor data records, whole
	Sensors     map[byte]*Sensor
	Entries     [][16]byte // event log
	Inventory   map[byte][]byte
	Manufact    uint32
	IPMI        byte // version, digits swapped; 02h: 2.0
	Watts       uint16
	NoDCMI      bool
	Node        *Me
	Updating    bool // its firmware is being updated
	On          bool
	Trouble     byte          // byte 4 of Get Chassis Status
	Latency     time.Duration // of each command by the in-memory transport
	MaxPart     int           // most bytes of a record that it returns at once
	LoseEvery   int           // a reservation is lost at each n-th Get SDR
	Loop        bool          // the last record is followed by the first
	Device      bool          // it has no repository, but device records
	Grow        bool          // its records change at each look
	Fault       Fault         // of every command
	FaultOf     map[[2]byte]Fault
	Stamp       uint32 // of the last change of the records
	Erased      uint32 // when the event log was cleared
	Commands    map[[2]byte]int
	reservation uint16
	gets        int
}

// New returns a BMC without sensors.
func New() *BMC {
	return &BMC{
		Sensors: map[byte]*Sensor{}, Inventory: map[byte][]byte{}, Manufact: bmc.IntelManufacturer, IPMI: 0x02, On: true,
		Watts: 312, Commands: map[[2]byte]int{}, FaultOf: map[[2]byte]Fault{}, Stamp: 1000, Erased: 1,
	}
}

// Do changes the BMC while it is in use.
func (b *BMC) Do(change func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	change()
}

// Add adds a record, and a sensor if r is one of a sensor that has readings.
func (b *BMC) Add(r []byte, s Sensor) {
	binary.LittleEndian.PutUint16(r, uint16(len(b.Records)+1))
	b.Records = append(b.Records, r)
	if r[3] <= 2 {
		b.Sensors[r[7]] = &s
	}
}

// Raw returns all records, one after the other.
func (b *BMC) Raw() []byte {
	var all []byte
	for _, r := range b.Records {
		all = append(all, r...)
	}
	return all
}

// Log adds an entry to the event log.
func (b *BMC) Log(e [16]byte) {
	binary.LittleEndian.PutUint16(e[:], uint16(len(b.Entries)+1))
	b.Entries = append(b.Entries, e)
}

// Handle answers a command. No answer at all is nil.
func (b *BMC) Handle(to bmc.Addr, netFn, cmd byte, data []byte) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.Commands[[2]byte{netFn, cmd}]++
	fault := b.Fault
	if f := b.FaultOf[[2]byte{netFn, cmd}]; f != None {
		fault = f
	}
	if netFn == 0x04 && cmd == 0x2d && len(data) > 0 && b.Sensors[data[0]] != nil && b.Sensors[data[0]].Fault != None {
		fault = b.Sensors[data[0]].Fault
	}
	r := b.answer(to, netFn, cmd, data)
	switch fault {
	case Silent:
		return nil
	case Busy:
		return []byte{bmc.CodeBusy}
	case Refuse:
		return []byte{bmc.CodeNotPresent}
	case NotReady:
		return []byte{bmc.CodeInitializing}
	case Short:
		return r[:1]
	case Long:
		return append(r, 1, 2, 3, 4, 5, 6, 7, 8)
	case Garbage:
		r = make([]byte, 1+rand.N(40))
		for i := range r[1:] {
			r[1+i] = byte(rand.Uint32())
		}
	case Empty:
		return []byte{}
	}
	return r
}

func le16(v uint16) []byte { return binary.LittleEndian.AppendUint16(nil, v) }

func join(parts ...[]byte) []byte {
	r := []byte{0}
	for _, p := range parts {
		r = append(r, p...)
	}
	return r
}

func (b *BMC) answer(to bmc.Addr, netFn, cmd byte, d []byte) []byte {
	if !to.IsBMC() {
		if b.Node == nil || to.Slave != b.Node.Addr || to.Channel != b.Node.Channel {
			return []byte{0x83} // not acknowledged on the bus (§22.7)
		}
		if b.Node.Mute {
			return nil
		}
		return b.Node.answer(netFn, cmd, d)
	}
	arg := func(i int) byte {
		if i < len(d) {
			return d[i]
		}
		return 0
	}
	switch [2]byte{netFn, cmd} {
	case [2]byte{0x00, 0x01}: // Get Chassis Status
		return []byte{0, map[bool]byte{false: 0x60, true: 0x61}[b.On], 0, b.Trouble}
	case [2]byte{0x04, 0x20}: // Get Device SDR Info
		if !b.Device {
			return []byte{bmc.CodeInvalid}
		}
		return append([]byte{0, byte(len(b.Records)), 0x81}, le32(b.Stamp)...)
	case [2]byte{0x04, 0x23}: // Get Sensor Reading Factors
		s := b.Sensors[arg(0)]
		if s == nil || s.Factors == nil {
			return []byte{bmc.CodeNotPresent}
		}
		f := s.Factors[arg(1)]
		return append([]byte{0, arg(1) + 1}, f[:]...)
	case [2]byte{0x04, 0x27}: // Get Sensor Thresholds
		s := b.Sensors[arg(0)]
		if s == nil {
			return []byte{bmc.CodeNotPresent}
		}
		return append([]byte{0}, s.Thresholds[:]...)
	case [2]byte{0x04, 0x2d}: // Get Sensor Reading
		s := b.Sensors[arg(0)]
		if s == nil {
			return []byte{bmc.CodeNotPresent}
		}
		flags := byte(0xc0)
		if s.Off {
			flags &^= 0x40
		}
		if s.Unknown {
			flags |= 0x20
		}
		return []byte{0, s.Raw, flags, byte(s.States), byte(s.States >> 8)}
	case [2]byte{0x06, 0x01}: // Get Device ID
		support := byte(0xbf)
		if b.Device {
			support &^= bmc.SupportRepository
		}
		firmware := byte(2)
		if b.Updating {
			firmware |= 0x80
		}
		return []byte{0, 0x20, 1, firmware, 0x34, b.IPMI, support, byte(b.Manufact), byte(b.Manufact >> 8), byte(b.Manufact >> 16), 0x49, 0, 0, 0, 0, 0}
	case [2]byte{0x06, 0x2e}, [2]byte{0x06, 0x30}: // Set BMC Global Enables, Clear Message Flags: of drivers
		return []byte{0}
	case [2]byte{0x06, 0x2f}: // Get BMC Global Enables
		return []byte{0, 0x09}
	case [2]byte{0x06, 0x42}: // Get Channel Info: 0 and 6 are IPMB, 15 is the system interface
		switch arg(0) & 0x0f {
		case 0, 6:
			return []byte{0, arg(0) & 0x0f, 1, 1, 0x80, 0xf2, 0x1b, 0, 0, 0}
		case 0x0e, 0x0f:
			return []byte{0, 0x0f, 0x0c, 0x05, 0, 0xf2, 0x1b, 0, 0, 0}
		}
		return []byte{bmc.CodeDataField}
	case [2]byte{0x0a, 0x10}: // Get FRU Inventory Area Info
		if b.Inventory[arg(0)] == nil {
			return []byte{bmc.CodeNotPresent}
		}
		return append(join(le16(uint16(len(b.Inventory[arg(0)])))), 0)
	case [2]byte{0x0a, 0x11}: // Read FRU Data
		all, at, n := b.Inventory[arg(0)], int(arg(1))|int(arg(2))<<8, int(arg(3))
		if at >= len(all) {
			return []byte{bmc.CodeRange}
		}
		part := all[at:min(len(all), at+n)]
		return join([]byte{byte(len(part))}, part)
	case [2]byte{0x0a, 0x20}: // Get SDR Repository Info
		if b.Device {
			return []byte{bmc.CodeInvalid}
		}
		if b.Grow {
			b.Stamp++
		}
		return join([]byte{0x51}, le16(uint16(len(b.Records))), le16(0xffff), le32(b.Stamp), le32(0), []byte{0x02})
	case [2]byte{0x0a, 0x22}, [2]byte{0x04, 0x22}: // Reserve SDR Repository
		b.reservation++
		return join(le16(b.reservation))
	case [2]byte{0x0a, 0x23}, [2]byte{0x04, 0x21}: // Get SDR
		return b.record(d)
	case [2]byte{0x0a, 0x2c}: // Run Initialization Agent: it has run
		return []byte{0, 1}
	case [2]byte{0x0a, 0x40}: // Get SEL Info
		last := uint32(0)
		if n := len(b.Entries); n > 0 {
			last = binary.LittleEndian.Uint32(b.Entries[n-1][3:])
		}
		return join([]byte{0x51}, le16(uint16(len(b.Entries))), le16(uint16(16*(512-len(b.Entries)))), le32(last), le32(b.Erased), []byte{0x02})
	case [2]byte{0x0a, 0x41}: // Get SEL Allocation Info
		return join(le16(512), le16(16), le16(uint16(512-len(b.Entries))), le16(1), []byte{1})
	case [2]byte{0x0a, 0x42}: // Reserve SEL
		return join(le16(1))
	case [2]byte{0x0a, 0x43}: // Get SEL Entry
		return b.entry(int(arg(2)) | int(arg(3))<<8)
	case [2]byte{0x2c, 0x01}: // Get DCMI Capabilities Info
		if b.NoDCMI || arg(0) != 0xdc {
			return []byte{bmc.CodeInvalid}
		}
		return []byte{0, 0xdc, 1, 5, 2, 1, 1, 1}
	case [2]byte{0x2c, 0x02}: // Get Power Reading
		if b.NoDCMI || arg(0) != 0xdc {
			return []byte{bmc.CodeInvalid}
		}
		return join([]byte{0xdc}, statistics(b.Watts, 1000), []byte{0x40})
	}
	return []byte{bmc.CodeInvalid}
}

func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }

// statistics are a current value and a minimum, maximum and average that follow
// from it.
func statistics(v uint16, period uint32) []byte {
	return join(le16(v), le16(v-v/8), le16(v+v/4), le16(v-1), le32(1700000000), le32(period))[1:]
}

func (b *BMC) record(d []byte) []byte {
	if len(d) < 6 {
		return []byte{bmc.CodeLength}
	}
	id, at, n := int(d[2])|int(d[3])<<8, int(d[4]), int(d[5])
	b.gets++
	if b.LoseEvery > 0 && b.gets%b.LoseEvery == 0 {
		b.reservation++
	}
	if at > 0 && binary.LittleEndian.Uint16(d) != b.reservation {
		return []byte{bmc.CodeReservation}
	}
	id = max(1, id)
	if id > len(b.Records) {
		return []byte{bmc.CodeNotPresent}
	}
	next := uint16(id + 1)
	if id == len(b.Records) {
		next = 0xffff
		if b.Loop {
			next = 1
		}
	}
	r := b.Records[id-1]
	if n == 0xff {
		n = len(r) - at
	}
	switch {
	case b.MaxPart > 0 && n > b.MaxPart:
		return []byte{bmc.CodeTooMany}
	case at+n > len(r):
		return []byte{bmc.CodeRange}
	}
	return join(le16(next), r[at:at+n])
}

func (b *BMC) entry(id int) []byte {
	switch {
	case id == 0:
		id = 1
	case id == 0xffff:
		id = len(b.Entries)
	}
	if id < 1 || id > len(b.Entries) {
		return []byte{bmc.CodeNotPresent}
	}
	next := uint16(id + 1)
	if id == len(b.Entries) {
		next = 0xffff
	}
	return join(le16(next), b.Entries[id-1][:])
}

var intel = []byte{0x57, 0x01, 0x00}

func (m *Me) answer(netFn, cmd byte, d []byte) []byte {
	switch {
	case netFn == 0x06 && cmd == 0x01:
		return []byte{0, 0x50, 1, 3, 0x00, 0x02, 0x21, 0x57, 1, 0, 0x0b, 0x0b, 0, 0, 0, 0}
	case netFn != 0x2e || len(d) < 3:
		return []byte{bmc.CodeInvalid}
	case cmd == 0xca:
		return join(intel, []byte{m.Version, 1, 3, 0, 0x11})
	case cmd == 0xc8 && len(d) >= 6:
		v, ok := map[byte]uint16{1: m.Watts, 2: m.Inlet, 4: m.Airflow, 5: m.Outlet}[d[3]]
		if !ok {
			return []byte{0x88} // invalid mode (NM 3.0, C8h)
		}
		return join(intel, statistics(v, 3600), []byte{0x50})
	case cmd == 0x65 && len(d) >= 4 && d[3] == 1:
		return join(intel, le16(m.CUPS))
	case cmd == 0x65 && len(d) >= 4 && d[3] == 5:
		le64 := func(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }
		return join(intel, le64(m.Busy.CPU), le64(m.Busy.Memory), le64(m.Busy.IO))
	}
	return []byte{bmc.CodeInvalid}
}

// Transport is a BMC in memory. A command that is not answered costs its
// time-out; Hold is how long the interface stays taken after that, as a real
// one does.
type Transport struct {
	BMC  *BMC
	Hold time.Duration

	held time.Time // until when
}

// Send implements [bmc.Transport].
func (t *Transport) Send(ctx context.Context, r *bmc.Request, buf []byte) (int, error) {
	if wait := time.Until(t.held); wait > 0 {
		if wait > r.Timeout {
			return 0, sleep(ctx, r.Timeout, bmc.ErrBusy)
		}
		if err := sleep(ctx, wait, nil); err != nil {
			return 0, err
		}
	}
	latency := t.BMC.Latency
	if !r.To.IsBMC() && t.BMC.Node != nil {
		latency += t.BMC.Node.Latency
	}
	if latency > r.Timeout {
		return 0, sleep(ctx, r.Timeout, bmc.ErrTimeout)
	}
	if latency > 0 {
		if err := sleep(ctx, latency, nil); err != nil {
			return 0, err
		}
	}
	a := t.BMC.Handle(r.To, r.NetFn, r.Cmd, r.Data)
	if a == nil {
		t.held = time.Now().Add(t.Hold)
		return 0, sleep(ctx, r.Timeout, bmc.ErrTimeout)
	}
	return copy(buf, a), nil
}

// Close implements [bmc.Transport].
func (t *Transport) Close() error { return nil }

func sleep(ctx context.Context, d time.Duration, err error) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return err
	}
}
