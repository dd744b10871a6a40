package ipmi

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/kvmeter/kvmeter/collectors/ipmi/bmc/bmctest"
)

// Sim is a running ipmi_sim (OpenIPMI).
type Sim struct {
	// Port is where QEMU connects to, on 127.0.0.1.
	Port int

	cmd  *exec.Cmd
	said bytes.Buffer
}

// StartSim starts ipmi_sim with the records and readings of a fake BMC. Its files
// are in dir.
func StartSim(ctx context.Context, dir string, b *bmctest.BMC) (*Sim, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "lan.conf")
	commands := filepath.Join(dir, "commands")
	state := filepath.Join(dir, "state")
	text := fmt.Sprintf("name \"kvmeter\"\nset_working_mc 0x20\n  serial 15 127.0.0.1 %d codec VM\n  startnow false\n", port)
	for path, content := range map[string][]byte{config: []byte(text), commands: simCommands(b)} {
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(state, 0o755); err != nil {
		return nil, err
	}
	s := &Sim{Port: port, cmd: exec.CommandContext(ctx, "ipmi_sim", "-c", config, "-f", commands, "-s", state, "-n")}
	s.cmd.Stdout, s.cmd.Stderr = &s.said, &s.said
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	for range 100 {
		// Its one connection must be QEMU's.
		if all, err := os.ReadFile("/proc/net/tcp"); err == nil && bytes.Contains(all, fmt.Appendf(nil, "0100007F:%04X 00000000:0000 0A", port)) {
			return s, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil, fmt.Errorf("ipmi_sim does not listen: %w: %s", s.End(), s.said.Bytes())
}

// End ends it.
func (s *Sim) End() error {
	if err := s.cmd.Process.Kill(); err != nil {
		return err
	}
	_ = s.cmd.Wait() // it was killed
	return nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

// simCommands are what ipmi_sim reads at its start (ipmi_sim_cmd(5)).
func simCommands(b *bmctest.BMC) []byte {
	var c bytes.Buffer
	fmt.Fprintln(&c, "mc_setbmc 0x20\nmc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x000157 0x0049\nsel_enable 0x20 1000 0x0a")
	for _, r := range b.Records {
		if s := b.Sensors[r[7]]; r[3] <= 2 && s != nil {
			number, kind, event := r[7], r[12], r[13]
			fmt.Fprintf(&c, "sensor_add 0x20 0 %#x %#x %#x\n", number, kind, event)
			if r[3] == 1 {
				fmt.Fprintf(&c, "sensor_set_value 0x20 0 %#x %#x 0\n", number, s.Raw)
			}
			for i := range 15 {
				if r[3] == 2 && s.States&(1<<i) != 0 {
					fmt.Fprintf(&c, "sensor_set_bit 0x20 0 %#x %d 1 0\n", number, i)
				}
			}
			if !s.Off {
				fmt.Fprintf(&c, "sensor_set_event_support 0x20 0 %#x enable scanning per-state 000111111111111 000111111111111 000000000000000 000000000000000\n", number)
			}
		}
		fmt.Fprint(&c, "main_sdr_add 0x20")
		for _, x := range r {
			fmt.Fprintf(&c, " %#02x", x)
		}
		fmt.Fprintln(&c)
	}
	fmt.Fprintln(&c, "mc_enable 0x20")
	return c.Bytes()
}
