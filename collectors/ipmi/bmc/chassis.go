package bmc

import (
	"context"
	"fmt"
)

// Chassis is the state of the machine (§28.2).
type Chassis struct {
	On     bool     `json:"on"`
	Faults []string `json:"faults"` // what is wrong; a slice that nobody may change
	bits   uint16
}

// chassisFaults are the bits of Get Chassis Status that tell of trouble: those
// of the power state in the low byte, those of the chassis in the high one.
var chassisFaults = []struct {
	bit  uint16
	name string
}{
	{1 << 1, "power overload"},
	{1 << 2, "power interlock"},
	{1 << 3, "main power fault"},
	{1 << 4, "power control fault"},
	{1 << 8, "intrusion"},
	{1 << 10, "drive fault"},
	{1 << 11, "cooling fault"},
}

// Chassis asks for the state of the machine: Get Chassis Status (§28.2).
func (b *BMC) Chassis(ctx context.Context) (Chassis, error) {
	r, err := b.command(ctx, Addr{}, netChassis, 0x01, 3)
	if err != nil {
		return Chassis{}, fmt.Errorf("ask for the chassis' state: %w", err)
	}
	c := Chassis{On: r[0]&1 != 0, bits: uint16(r[0]) | uint16(r[2])<<8}
	for _, f := range chassisFaults {
		if c.bits&f.bit != 0 {
			c.Faults = append(c.Faults, f.name)
		}
	}
	return c, nil
}
