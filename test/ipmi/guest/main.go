// Command guest is the first process of a guest with an IPMI device. It says
// "ready" on the second serial port once the device is there, or why it is not,
// and then runs the commands that it reads there, a JSON [proto.Command] a line,
// and answers each by a [proto.Result]. It turns the guest off when there are no more.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/kvmeter/kvmeter/test/boot/inside"
	"github.com/kvmeter/kvmeter/test/ipmi/proto"
)

func main() {
	_ = os.Setenv("PATH", "/bin") // it is a valid name
	_ = os.Setenv("HOME", "/tmp")
	if err := run(); err != nil {
		fmt.Println("init:", err) // on the console
	}
	inside.PowerOff()
}

func run() error {
	for _, m := range []struct{ dir, kind string }{{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}, {"/tmp", "tmpfs"}} {
		if err := inside.Mount(m.kind, m.dir, m.kind); err != nil {
			return err
		}
	}
	port, err := inside.OpenSerial("/dev/ttyS1")
	if err != nil {
		return err
	}
	out := json.NewEncoder(port)
	if err := inside.InsertModules(); err != nil {
		return errors.Join(err, out.Encode(proto.Result{Err: err.Error()}))
	}
	ready := proto.Result{Out: "ready"}
	for try := 0; ; try++ {
		if _, err := os.Stat("/dev/ipmi0"); err == nil {
			break
		}
		if try == 300 {
			ready = proto.Result{Out: "ready", Err: "there is no /dev/ipmi0"}
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err := out.Encode(ready); err != nil {
		return err
	}
	lines := bufio.NewScanner(port)
	for lines.Scan() {
		var c proto.Command
		if len(lines.Bytes()) == 0 {
			continue
		}
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			return err
		}
		if len(c.Args) == 0 {
			return nil
		}
		if err := out.Encode(do(c)); err != nil {
			return err
		}
	}
	return lines.Err()
}

func do(c proto.Command) proto.Result {
	if c.Args[0] == proto.ReadFile {
		b, err := os.ReadFile(c.Args[1])
		if err != nil {
			return proto.Result{Err: err.Error(), Code: 1}
		}
		return proto.Result{Data: b}
	}
	var stdout, stderr bytes.Buffer
	start := time.Now()
	cmd := exec.Command(c.Args[0], c.Args[1:]...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Env = append(os.Environ(), c.Env...)
	if c.UID != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: c.UID, Gid: c.UID}}
	}
	err := cmd.Run()
	r := proto.Result{Out: stdout.String(), Err: stderr.String(), Took: time.Since(start)}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
	case err != nil:
		r.Code, r.Err = 127, err.Error()
	}
	return r
}
