// Command oracle prints what github.com/bougou/go-ipmi reads from /dev/ipmi0.
// It is a module of its own, so that kvmeter does not depend on that library.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/bougou/go-ipmi"
)

// sensor is one as the library has it.
type sensor struct {
	Name   string
	Number uint8
	Raw    uint8
	Value  float64
	Valid  bool
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

func run() error {
	ctx := context.Background()
	c, err := ipmi.NewOpenClient()
	if err != nil {
		return err
	}
	if err := c.Connect(ctx); err != nil {
		return err
	}
	defer func() { _ = c.Close(ctx) }()
	all, err := c.GetSensors(ctx)
	if err != nil {
		return err
	}
	out := struct {
		Sensors []sensor
		Watts   uint16
	}{}
	for _, s := range all {
		out.Sensors = append(out.Sensors, sensor{s.Name, s.Number, s.Raw, s.Value, s.IsReadingValid()})
	}
	if p, err := c.GetDCMIPowerReading(ctx); err == nil {
		out.Watts = p.CurrentPower
	}
	return json.NewEncoder(os.Stdout).Encode(out)
}
