// Package bmc speaks IPMI with the host's baseboard management controller: it
// walks its sensor data records, reads and converts its sensors, its event log,
// inventory and chassis state, and the power meters of DCMI and of Intel's Node
// Manager. Section numbers are those of the IPMI v2.0 specification, rev. 1.1,
// unless they name another document.
package bmc

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Errors that a caller decides by.
var (
	// ErrTimeout: the controller did not answer in time.
	ErrTimeout = errors.New("the BMC does not answer")
	// ErrBusy: the interface is still taken by an earlier command that was
	// given up. What was asked now was not sent.
	ErrBusy = errors.New("the BMC's interface is still taken by a command that was not answered")
	// ErrReply: the answer is no valid one.
	ErrReply = errors.New("the BMC's answer is malformed")
	// ErrGone: the device can't be used any more.
	ErrGone = errors.New("the IPMI device is gone")
	// ErrNoSDR: the BMC describes no sensor.
	ErrNoSDR = errors.New("the BMC has no sensor data records")
)

// Addr is a controller. The zero Addr is the BMC itself, by the system interface.
type Addr struct {
	Slave   byte // IPMB address, 8 bits; 0 or 20h: the BMC (§5.5)
	Channel byte // that the IPMB address is on (§6.3)
	LUN     byte
}

// BMCSlave is the BMC's own address (§5.5).
const BMCSlave = 0x20

// IsBMC reports whether the address is reached by the system interface alone.
func (a Addr) IsBMC() bool { return a.Slave == 0 || a.Slave == BMCSlave && a.Channel == 0 }

// Request is a command for a controller.
type Request struct {
	To         Addr
	NetFn, Cmd byte // §5.1
	Data       []byte
	Timeout    time.Duration // for the answer
}

// Transport carries requests, one at a time.
type Transport interface {
	// Send sends a request and puts the answer into buf, its completion code
	// first. An answer is at least that byte.
	Send(ctx context.Context, r *Request, buf []byte) (n int, err error)
	// Close frees the transport.
	Close() error
}

// Network functions (§5.1, Table 5-1) and the extensions' bodies.
const (
	netChassis = 0x00
	netSensor  = 0x04
	netApp     = 0x06
	netStorage = 0x0a
	netGroup   = 0x2c // group extension, of which DCMI is DCh
	netOEM     = 0x2e // OEM, with the manufacturer's number in front
)

// Completion codes (§5.2, Table 5-2).
const (
	CodeBusy         = 0xc0 // node busy
	CodeInvalid      = 0xc1 // the command is unknown
	CodeInvalidLUN   = 0xc2
	CodeTimeout      = 0xc3
	CodeReservation  = 0xc5 // reservation lost
	CodeLength       = 0xc7 // request's length invalid
	CodeFieldLength  = 0xc8 // field too long
	CodeRange        = 0xc9 // parameter out of range
	CodeTooMany      = 0xca // cannot return so many bytes
	CodeNotPresent   = 0xcb // no such sensor, data or record
	CodeDataField    = 0xcc // invalid field
	CodeIllegal      = 0xcd // command illegal for this sensor or record
	CodeNoAnswer     = 0xce // no answer could be given
	CodeUpdate       = 0xd0 // repository in update mode
	CodeFirmware     = 0xd1 // firmware update going on
	CodeInitializing = 0xd2
	CodeUnspecified  = 0xff
)

var codes = map[byte]string{
	CodeBusy:         "busy",
	CodeInvalid:      "the command is unknown to it",
	CodeInvalidLUN:   "the command is unknown at this LUN",
	CodeTimeout:      "it timed out itself",
	0xc4:             "out of space",
	CodeReservation:  "the reservation is lost",
	0xc6:             "the request was cut short",
	CodeLength:       "the request has the wrong length",
	CodeFieldLength:  "a field of the request is too long",
	CodeRange:        "a parameter is out of range",
	CodeTooMany:      "it cannot return so many bytes",
	CodeNotPresent:   "no such sensor, data or record",
	CodeDataField:    "a field of the request is invalid",
	CodeIllegal:      "the command is illegal for this sensor or record",
	CodeNoAnswer:     "it could not make an answer",
	0xcf:             "it takes the request for a duplicate",
	CodeUpdate:       "its repository is being updated",
	CodeFirmware:     "its firmware is being updated",
	CodeInitializing: "it is initializing",
	0xd3:             "the destination is unavailable",
	0xd4:             "no sufficient privilege",
	0xd5:             "not possible in its present state",
	0xd6:             "the function is disabled",
	CodeUnspecified:  "unspecified error",
}

// CodeError is an answer whose completion code says that the command failed.
type CodeError struct{ NetFn, Cmd, Code byte }

// Error implements error.
func (e *CodeError) Error() string {
	text := codes[e.Code]
	if text == "" {
		text = "command-specific or OEM error"
	}
	return fmt.Sprintf("the BMC refuses command %02xh/%02xh: %s (%02xh)", e.NetFn, e.Cmd, text, e.Code)
}

// Code returns the completion code that err carries, or 0.
func Code(err error) byte {
	var e *CodeError
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}

// Lacks reports whether err says for good that there is no such thing: no such
// command, sensor or record.
func Lacks(err error) bool {
	switch Code(err) {
	case CodeInvalid, CodeInvalidLUN, CodeNotPresent, CodeIllegal:
		return true
	}
	return false
}

// DefaultTimeout is how long a command is waited for. KCS itself allows 5 s
// (§9.15), which a driver goes on waiting for after us.
const DefaultTimeout = time.Second

const (
	maxReply   = 272 // of the driver (IPMI_MAX_MSG_LENGTH in linux/ipmi.h)
	busyTries  = 4   // sendings of a command that the BMC is too busy for
	busyPause  = 20 * time.Millisecond
	maxRequest = 32
)

// Pacer keeps the waiting for answers within bounds.
type Pacer interface {
	// Wait waits until another command may be sent.
	Wait(ctx context.Context) error
	// Spend takes how long the BMC's own answer was waited for. Others answer
	// over a bus, which leaves the BMC's interface free meanwhile.
	Spend(d time.Duration)
}

// BMC asks a controller. It is for one goroutine at a time.
type BMC struct {
	t    Transport
	req  Request
	data [maxRequest]byte
	buf  [maxReply]byte

	// Timeout bounds each command.
	Timeout time.Duration
	// Pacer says when a command may be sent; nil: at any time.
	Pacer Pacer
	// Waited is how long answers were waited for, in all.
	Waited time.Duration
	// Commands counts what was sent.
	Commands uint64
	// Busy counts the answers "busy".
	Busy uint64
}

// New returns a BMC behind t, with the default time-out.
func New(t Transport) *BMC { return &BMC{t: t, Timeout: DefaultTimeout} }

// Close closes the transport.
func (b *BMC) Close() error { return b.t.Close() }

// command sends a command and returns what follows the completion code, at
// least least bytes of it, which is good until the next command.
func (b *BMC) command(ctx context.Context, to Addr, netFn, cmd byte, least int, data ...byte) ([]byte, error) {
	b.req = Request{To: to, NetFn: netFn, Cmd: cmd, Data: b.data[:copy(b.data[:], data)], Timeout: b.Timeout}
	for try := 1; ; try++ {
		if b.Pacer != nil {
			if err := b.Pacer.Wait(ctx); err != nil {
				return nil, err
			}
		}
		start := time.Now()
		n, err := b.t.Send(ctx, &b.req, b.buf[:])
		took := time.Since(start)
		b.Waited += took
		b.Commands++
		if b.Pacer != nil && to.IsBMC() {
			b.Pacer.Spend(took)
		}
		if err != nil {
			return nil, err
		}
		if n < 1 {
			return nil, fmt.Errorf("command %02xh/%02xh: %w: it is empty", netFn, cmd, ErrReply)
		}
		switch code := b.buf[0]; {
		case code == CodeBusy && try < busyTries:
			b.Busy++
			if err := pause(ctx, busyPause<<try); err != nil {
				return nil, err
			}
			continue
		case code != 0:
			return nil, &CodeError{netFn, cmd, code}
		}
		if n-1 < least {
			return nil, fmt.Errorf("command %02xh/%02xh: %w: %d bytes, at least %d are needed", netFn, cmd, ErrReply, n-1, least)
		}
		return b.buf[1:n], nil
	}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func le16(b []byte) uint16 { return uint16(b[0]) | uint16(b[1])<<8 }

func le24(b []byte) uint32 { return uint32(le16(b)) | uint32(b[2])<<16 }

func le32(b []byte) uint32 { return uint32(le16(b)) | uint32(le16(b[2:]))<<16 }

// Device is what a controller says of itself (§20.1).
type Device struct {
	ID           byte   `json:"id"`
	Revision     byte   `json:"revision"`
	Firmware     string `json:"firmware"`
	IPMI         string `json:"ipmi"`
	Support      byte   `json:"support"` // bits, see SupportRepository
	Manufacturer uint32 `json:"manufacturer"`
	Product      uint16 `json:"product"`
	Updating     bool   `json:"updating"` // its firmware is being updated
	Implemented  byte   `json:"-"`        // Node Manager: low nibble of its firmware's implementation (NM 3.0)
}

// SupportRepository is the bit of [Device.Support] that says that there is a
// repository of sensor data records (§20.1, byte 6).
const SupportRepository = 1 << 1

// IntelManufacturer is Intel's IANA number.
const IntelManufacturer = 0x000157

// DeviceID asks a controller who it is: Get Device ID (§20.1).
func (b *BMC) DeviceID(ctx context.Context, to Addr) (Device, error) {
	r, err := b.command(ctx, to, netApp, 0x01, 11)
	if err != nil {
		return Device{}, fmt.Errorf("ask the controller who it is: %w", err)
	}
	d := Device{
		ID: r[0], Revision: r[1] & 0x0f, Updating: r[2]&0x80 != 0,
		Firmware: fmt.Sprintf("%d.%02x", r[2]&0x7f, r[3]),
		IPMI:     fmt.Sprintf("%d.%d", r[4]&0x0f, r[4]>>4), // BCD, digits swapped
		Support:  r[5], Manufacturer: le24(r[6:]) & 0x0fffff, Product: le16(r[9:]),
		Implemented: r[10] & 0x0f,
	}
	if major := r[4] & 0x0f; major < 1 || major > 2 {
		return d, fmt.Errorf("%w: it speaks IPMI %s, of which this program knows 1.5 and 2.0", ErrReply, d.IPMI)
	}
	return d, nil
}
