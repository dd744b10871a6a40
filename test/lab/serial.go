package lab

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// ErrCommand is in the error of [Guest.Exec] when the guest itself refused or
// failed the command.
var ErrCommand = errors.New("the guest says no")

func (g *Guest) socket() string { return g.host.path("run", g.Name+".serial") }

// Exec has a Linux guest do one command and returns what it says about it. It
// waits for the end of the command, however long, unless ctx ends before; then
// the guest may still do it, and the next one waits until it has.
//
// Commands:
//
//	write BS COUNT [FIRST] [DISK]   COUNT requests of BS bytes (≤ 256 KiB) from block FIRST on
//	read BS COUNT [FIRST] [DISK]
//	flush [DISK]                    one flush
//	udp COUNT SIZE [NIC]            COUNT frames of 42 + SIZE bytes to nobody
//	cpu PCT SECONDS                 PCT % of one CPU; 0 seconds is for ever
//	cpusec SECONDS                  so much CPU time by the guest's own account, 2.5 for example
//	mix PCT IOPS PPS SECONDS        a load to look at: CPU, disk and network
//	mem MIB                         holds so much memory in use; 0 gives it back
//	stat                            the guest's own counters
//	off                             powers off
//	true                            nothing
//
// DISK is vda unless it says vdb, NIC is eth0 unless it says eth1, and so on. "bg"
// before a command lets it run beside the others; what it says is lost.
func (g *Guest) Exec(ctx context.Context, command string) (string, error) {
	out, err := g.exec(ctx, command)
	if err != nil {
		return out, fmt.Errorf("guest %s: %s: %w", g.Name, command, err)
	}
	return out, nil
}

func (g *Guest) exec(ctx context.Context, command string) (string, error) {
	if g.Spec.Kind != Linux {
		return "", errors.New("only Linux guests obey commands")
	}
	if strings.ContainsAny(command, "\r\n") || len(command) > 400 {
		return "", errors.New("a command is one line of at most 400 bytes")
	}
	conn, hangUp, err := g.dial(ctx)
	if err != nil {
		return "", err
	}
	defer hangUp()
	token := newToken()
	if err := send(conn, token, command); err != nil {
		return "", err
	}
	out, err := answer(bufio.NewReader(conn), token)
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return out, err
}

// WaitReady returns when a Linux guest obeys.
func (g *Guest) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	if err := g.waitReady(ctx); err != nil {
		return fmt.Errorf("wait for guest %s: %w\n%s", g.Name, err, tail(g.Console()))
	}
	return nil
}

// waitReady asks until the guest answers: at once when it says that it is
// ready, and each half second in case that was said before.
func (g *Guest) waitReady(ctx context.Context) error {
	conn, hangUp, err := g.dial(ctx)
	if err != nil {
		return err
	}
	defer hangUp()
	token := newToken()
	ask := func() { _ = send(conn, token, "true") } // an error there is one in reading too
	done := make(chan error, 1)
	ready := make(chan struct{}, 1)
	go func() {
		in := bufio.NewReader(conn)
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				done <- ended(err)
				return
			}
			switch strings.TrimSpace(line) {
			case "@boot - READY":
				select {
				case ready <- struct{}{}:
				default:
				}
			case "@" + token + " DONE 0":
				done <- nil
				return
			}
		}
	}()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-ready:
			ask()
		case <-tick.C:
			ask()
		}
	}
}

// dial connects to the guest's serial port, which nobody else has until hangUp.
func (g *Guest) dial(ctx context.Context) (conn net.Conn, hangUp func(), err error) {
	g.serial.Lock()
	unlock, err := g.lock(ctx)
	if err != nil {
		g.serial.Unlock()
		return nil, nil, err
	}
	conn, err = net.Dial("unix", g.socket())
	if err != nil {
		unlock()
		g.serial.Unlock()
		return nil, nil, fmt.Errorf("%w (does the guest run?)", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	return conn, func() {
		stop()
		_ = conn.Close()
		unlock()
		g.serial.Unlock()
	}, nil
}

func newToken() string {
	var b [6]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// send sends one command. The line break before it ends what an abandoned
// command may have left in the guest's port.
func send(w io.Writer, token, command string) error {
	_, err := fmt.Fprintf(w, "\n@%s %s @%s\n", token, command, token)
	return err
}

// answer reads the answer to the command with this token; all else is of
// earlier commands and left out.
func answer(in *bufio.Reader, token string) (string, error) {
	var out strings.Builder
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return out.String(), ended(err)
		}
		rest, ours := strings.CutPrefix(strings.TrimRight(line, "\r\n"), "@"+token+" ")
		if !ours {
			continue
		}
		if text, isText := strings.CutPrefix(rest, "- "); isText {
			if out.Len() > 0 {
				out.WriteByte('\n')
			}
			out.WriteString(text)
			continue
		}
		code, isEnd := strings.CutPrefix(rest, "DONE ")
		rc, err := strconv.Atoi(code)
		if !isEnd || err != nil {
			continue
		}
		if rc != 0 {
			return out.String(), fmt.Errorf("%w: %s", ErrCommand, out.String())
		}
		return out.String(), nil
	}
}

func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return errors.New("the guest has ended")
	}
	return err
}
