package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/mattn/go-runewidth"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/kvmeter/kvmeter/agent/client"
)

func busy(n int) *client.Snapshot {
	requests := []float64{3.25, 1234, 234567}
	s := &client.Snapshot{
		Node: "compute-1", Time: time.Date(2026, 1, 1, 14, 3, 7, 0, time.Local), Seconds: 1,
		Notes: []string{"disk requests: libvirt answers slowly (2.1 s), so they are read every 300 s", "no BTF: the task iterator counts instead of the walk"},
	}
	for i := range n {
		d := client.Domain{
			UUID: fmt.Sprintf("%08x-0d49-4c4e-8ad1-0c5b3a2f6f10", i*40503), Name: fmt.Sprintf("instance-%08x", i+1), VCPUs: 1 + i%4,
			CPU: float64(i*37%400) / 3, Wait: float64(i*7%50) / 4, DiskRead: float64(i) * 1e5, DiskWrite: float64(i%3) * 999,
			NetIn: float64(i%5) * 3e8, NetOut: float64(i%2) * 1023.6,
		}
		if i%3 == 0 {
			d.DiskIOPS = &requests[i/3%3]
		}
		switch i {
		case 0:
			d.Display = "web-frontend-production-1"
		case 2:
			d.Display = "日本語のサーバーの名前です"
		case 3:
			d.Display = "a\x1b[31mb"
		case 4:
			d.Error = "thread 4711 cannot be read: no such process; the domain is left out until the next poll"
		}
		s.Domains = append(s.Domains, d)
	}
	return s
}

func TestTopDrawsWithinTheTerminal(t *testing.T) {
	first := busy(3)
	first.Seconds = 0
	for name, tc := range map[string]struct {
		v view
		s *client.Snapshot
	}{
		"top-80x24":       {view{width: 80, height: 24}, busy(7)},
		"top-140x40":      {view{width: 140, height: 40}, busy(7)},
		"top-80x24-many":  {view{width: 80, height: 24, first: 5}, busy(60)},
		"top-80x24-end":   {view{width: 80, height: 24, first: 1000}, busy(60)},
		"top-44x10":       {view{width: 44, height: 10}, busy(60)},
		"top-first":       {view{width: 80, height: 12}, first},
		"top-empty":       {view{width: 80, height: 12}, busy(0)},
		"top-trouble":     {view{width: 80, height: 12, trouble: "the agent does not answer (connection refused), trying again"}, busy(2)},
		"top-colour":      {view{width: 100, height: 14, colour: true}, busy(5)},
		"top-sorted-name": {view{width: 80, height: 12, sort: -byCPU}, busy(4)},
		"top-plain":       {view{}, busy(7)},
		"top-8x3":         {view{width: 8, height: 3}, busy(7)},
		"top-1x1":         {view{width: 1, height: 1}, busy(7)},
	} {
		t.Run(name, func(t *testing.T) {
			tc.v.sort += byCPU
			tc.v.every = time.Second
			lines := tc.v.lines(tc.s)
			if tc.v.height > 0 && len(lines) != tc.v.height {
				t.Errorf("got %d lines, want %d", len(lines), tc.v.height)
			}
			for _, l := range lines {
				if !tc.v.colour && strings.Contains(l, "\x1b") {
					t.Errorf("escape in a picture without colours: %q", l)
				}
				if w := runewidth.StringWidth(l); !tc.v.colour && tc.v.width > 0 && w > tc.v.width {
					t.Errorf("line of %d columns: %q", w, l)
				}
			}
			golden(t, name, strings.Join(lines, "\n")+"\n")
		})
	}
}

func TestSizesHaveThreeDigitsAndFitEightColumns(t *testing.T) {
	for want, n := range map[string]float64{
		"0 B": 0, "1 B": 0.7, "999 B": 999, "1023 B": 1023.4, "1.00 KiB": 1023.5, "1.50 KiB": 1536, "9.99 KiB": 9.99 * 1024,
		"10.0 KiB": 9.996 * 1024, "100 KiB": 99.96 * 1024, "1023 KiB": 1023 * 1024, "1.00 MiB": 1023.9 * 1024,
		"9.31 GiB": 1e10, "1.00 TiB": 1 << 40, "1024 TiB": 1 << 50,
	} {
		if got := sizeText(n); got != want || len(got) > 8 {
			t.Errorf("%v: got %q, want %q", n, got, want)
		}
	}
}

func TestKeysAreWhatTerminalsSend(t *testing.T) {
	for in, want := range map[string][]key{
		"q": {keyQuit}, "\x03": {keyQuit}, "s": {keyNext}, "\x1b[C\x1b[D": {keyNext, keyPrevious},
		"\x1bOA\x1bOB": {keyUp, keyDown}, "\x1b[5~j": {keyPageUp, keyDown}, "\x1b": nil, "\x1b[": nil, "xyz\x1b[99~": nil,
	} {
		if got := parseKeys(in); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: got %v, want %v", in, got, want)
		}
	}
}

func TestSortGoesRoundTheColumns(t *testing.T) {
	v := view{sort: byCPU}
	for range topColumns {
		v.press(keyNext)
	}
	if v.sort != byCPU {
		t.Errorf("got column %d after a round, want %d", v.sort, byCPU)
	}
	for range topColumns {
		v.press(keyPrevious)
	}
	if v.sort != byCPU {
		t.Errorf("got column %d after a round back, want %d", v.sort, byCPU)
	}
	if v.press(keyQuit) {
		t.Error("q does not quit")
	}
}

// fakeAgent answers as an agent does, and ends a watch after some snapshots.
func fakeAgent(t *testing.T, snapshots int) string {
	t.Helper()
	return listen(t, func(w http.ResponseWriter, r *http.Request) {
		every, err := time.ParseDuration(r.URL.Query().Get("watch"))
		if err != nil {
			every, snapshots = 0, 1
		}
		for i := range snapshots {
			s := busy(2)
			s.Seconds = float64(i) * every.Seconds()
			if json.NewEncoder(w).Encode(s) != nil {
				return
			}
			w.(http.Flusher).Flush()
		}
		if every > 0 && snapshots == 0 {
			<-r.Context().Done()
		}
	})
}

// listen answers on a socket, whose path it returns.
func listen(t *testing.T, answer http.HandlerFunc) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: answer}}
	s.Start()
	t.Cleanup(s.Close)
	return path
}

func TestTopPrintsTables(t *testing.T) {
	path := fakeAgent(t, 4)
	out, err := run(t, "", "top", "--socket", path, "-n", "2")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "top-n2", out)
	out, err = run(t, "", "top", "--socket", path, "--once", "-f", "json")
	if err != nil {
		t.Fatal(err)
	}
	var got client.Snapshot
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	want := busy(2)
	if !got.Time.Equal(want.Time) {
		t.Errorf("got time %v, want %v", got.Time, want.Time)
	}
	got.Time = want.Time
	if !reflect.DeepEqual(&got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestTopSaysWhatToDo(t *testing.T) {
	dir := t.TempDir()
	closed := filepath.Join(dir, "closed.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: closed})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	gone := filepath.Join(dir, "gone.sock")
	short := fakeAgent(t, 2)
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"no agent":         {[]string{"--socket", gone}, "no agent answers at " + gone + " (no such file or directory): start one with `sudo kvmeter up`, or name the socket of one that runs with --socket"},
		"dead agent":       {[]string{"--socket", closed}, "no agent answers at " + closed + " (connection refused): start one with `sudo kvmeter up`, or name the socket of one that runs with --socket"},
		"agent that ends":  {[]string{"--socket", short, "-n", "5"}, "the agent at " + short + " went away"},
		"unknown format":   {[]string{"-f", "csv"}, `top has no output format "csv"; it has table and json`},
		"interval of zero": {[]string{"--interval", "0s"}, "--interval 0s is too short; it is at least 100ms"},
		"negative count":   {[]string{"-n", "-1"}, "-n is a number of tables, or 0 for no end"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := run(t, "", append([]string{"top"}, tc.args...)...); err == nil || err.Error() != tc.want {
				t.Errorf("got  %v\nwant %s", err, tc.want)
			}
		})
	}
	denied := &os.PathError{Op: "connect", Path: "/run/kvmeter/agent.sock", Err: unix.EACCES}
	if got, want := explainAgent(denied, denied.Path, []string{denied.Path}).Error(), "not allowed to ask the agent at /run/kvmeter/agent.sock (permission denied): use sudo, or join the group kvmeter"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestTopLooksForAnAgentThatRuns(t *testing.T) {
	dir := t.TempDir()
	gone, other := filepath.Join(dir, "gone.sock"), filepath.Join(dir, "other.sock")
	runs := fakeAgent(t, 3)
	for name, tc := range map[string]struct {
		o    Options
		args []string
		err  string
	}{
		"the others are tried in turn":     {o: Options{Socket: gone, Others: []string{other, runs}}},
		"the default comes first":          {o: Options{Socket: runs, Others: []string{gone}}},
		"one that is named is the only":    {o: Options{Socket: runs, Others: []string{runs}}, args: []string{"--socket", gone}, err: "no agent answers at " + gone + " ("},
		"all are named where none answers": {o: Options{Socket: gone, Others: []string{other}}, err: "no agent answers at " + gone + " or " + other + " (no such file or directory): "},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := top(tc.o)
			cmd.SetArgs(append([]string{"--once"}, tc.args...))
			cmd.SetOut(io.Discard)
			cmd.SetErr(io.Discard)
			err := cmd.ExecuteContext(context.Background())
			if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("got %v, want %q", err, tc.err)
			}
		})
	}
}

// terminal opens a pseudo-terminal of 80×24: what a program sees, and what its
// user does.
func terminal(t *testing.T) (program, user *os.File) {
	t.Helper()
	user, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("this kernel has no pseudo-terminals: %v", err)
	}
	fd := int(user.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80}); err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = user.Close(); _ = program.Close() })
	return program, user
}

func TestTopGivesTheTerminalBack(t *testing.T) {
	for name, quit := range map[string]func(user *os.File, cancel func()) error{
		"after q":        func(user *os.File, _ func()) error { _, err := user.WriteString("q"); return err },
		"after Ctrl-C":   func(user *os.File, _ func()) error { _, err := user.WriteString("\x03"); return err },
		"after a signal": func(_ *os.File, cancel func()) error { cancel(); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			program, user := terminal(t)
			before, err := term.GetState(int(program.Fd()))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			done := make(chan error, 1)
			go func() {
				done <- watchLive(ctx, client.Client{Path: fakeAgent(t, 3)}, topFlags{interval: time.Second}, program, program)
			}()
			var seen bytes.Buffer
			buf := make([]byte, 4096)
			quitted := false
			for !strings.Contains(seen.String(), leaveScreen) {
				n, err := user.Read(buf)
				if err != nil {
					t.Fatalf("read the terminal: %v; seen %q", err, &seen)
				}
				seen.Write(buf[:n])
				if !quitted && strings.Contains(seen.String(), "web-frontend") {
					quitted = true
					if err := quit(user, cancel); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			if !strings.HasPrefix(seen.String(), enterScreen) || !strings.HasSuffix(seen.String(), leaveScreen) {
				t.Errorf("the alternate screen is not entered first and left last: %q", &seen)
			}
			after, err := term.GetState(int(program.Fd()))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(after, before) {
				t.Errorf("got terminal %+v, want %+v", after, before)
			}
		})
	}
}
