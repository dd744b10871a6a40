package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/kvmeter/kvmeter/agent/client"
)

// topFlags are the flags of top.
type topFlags struct {
	sockets  []string // the first that is answered is asked
	interval time.Duration
	times    int
	once     bool
	format   string
}

func top(o Options) *cobra.Command {
	var f topFlags
	socket := o.Socket
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Watch the domains of this host live",
		Long: `Watch what the domains of this host use, as the agent on this host measures
it. CPU % is of one CPU: 200 is two vCPUs that never rest. WAIT % is the time in
which vCPUs wanted to run and had no CPU. Disk bytes are what the host moved,
IOPS the guest's requests as QEMU counts them; network is in the guest's
direction.

Where the output is no terminal, or with -n or --once, tables are printed one
after the other.`,
		Example: `  kvmeter top
  kvmeter top --once
  kvmeter top -n 60 --interval 10s -f json >> usage.jsonl`,
		Args:         noArgs,
		SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.format != "table" && f.format != "json" {
				return fmt.Errorf("top has no output format %q; it has table and json", f.format)
			}
			if f.interval < 100*time.Millisecond {
				return fmt.Errorf("--interval %v is too short; it is at least 100ms", f.interval)
			}
			if f.times < 0 {
				return errors.New("-n is a number of tables, or 0 for no end")
			}
			if f.once {
				f.times = 1
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			f.sockets = o.sockets(cmd, socket)
			agent := client.Client{Path: answered(f.sockets)}
			out, isFile := cmd.OutOrStdout().(*os.File)
			tty := isFile && term.IsTerminal(int(out.Fd())) && term.IsTerminal(int(os.Stdin.Fd()))
			if tty && f.times == 0 && f.format == "table" {
				return watchLive(ctx, agent, f, os.Stdin, out)
			}
			return watchPlain(ctx, agent, cmd.OutOrStdout(), f)
		},
	}
	socketFlag(cmd, &socket)
	cmd.Flags().DurationVar(&f.interval, "interval", time.Second, "time between two readings")
	cmd.Flags().IntVarP(&f.times, "times", "n", 0, "print `N` tables and end; 0: no end")
	cmd.Flags().BoolVar(&f.once, "once", false, "print one table and end")
	cmd.Flags().StringVarP(&f.format, "format", "f", "table", "`FORMAT`: table, or json (an object a line)")
	return cmd
}

// socketFlag lets the user say which agent to ask.
func socketFlag(cmd *cobra.Command, socket *string) {
	cmd.Flags().StringVar(socket, "socket", *socket, "socket of the agent")
}

// sockets returns where to look for an agent: at the socket alone if the user
// named it.
func (o Options) sockets(cmd *cobra.Command, socket string) []string {
	if cmd.Flags().Changed("socket") {
		return []string{socket}
	}
	return append([]string{socket}, o.Others...)
}

// answered returns the first socket that somebody listens at or that is not
// ours to ask, else the first.
func answered(sockets []string) string {
	for _, path := range sockets {
		conn, err := net.Dial("unix", path)
		if err == nil {
			err = conn.Close()
		}
		if err == nil || errors.Is(err, fs.ErrPermission) {
			return path
		}
	}
	return sockets[0]
}

// explainAgent says what to do where the agent at path could not be asked.
func explainAgent(err error, path string, sockets []string) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("not allowed to ask the agent at %s (%s): use sudo, or join the group kvmeter", path, reason(err))
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no agent answers at %s (%s): start one with `sudo kvmeter up`, or name the socket of one that runs with --socket", strings.Join(sockets, " or "), reason(err))
	}
	return err
}

// errEnough ends a watch that has shown what it was asked for.
var errEnough = errors.New("enough")

// watchPlain prints one table after the other. The first snapshot of a watch
// has no rates and is not shown.
func watchPlain(ctx context.Context, agent client.Client, w io.Writer, f topFlags) error {
	v := &view{width: terminalWidth(w), sort: byCPU, every: f.interval}
	v.colour = v.width > 0 && colours()
	shown := 0
	err := agent.Watch(ctx, f.interval, func(s client.Snapshot) error {
		if s.Seconds == 0 {
			return nil
		}
		if err := printSnapshot(w, &s, v, f.format, shown > 0); err != nil {
			return err
		}
		if shown++; shown == f.times {
			return errEnough
		}
		return nil
	})
	switch {
	case errors.Is(err, errEnough), ctx.Err() != nil:
		return nil
	case err == nil:
		return fmt.Errorf("the agent at %s went away", agent.Path)
	}
	return explainAgent(err, agent.Path, f.sockets)
}

func printSnapshot(w io.Writer, s *client.Snapshot, v *view, format string, more bool) error {
	if format == "json" {
		return json.NewEncoder(w).Encode(s)
	}
	if more {
		if _, err := fmt.Fprintln(w); err != nil {
			return err
		}
	}
	for _, line := range v.lines(s) {
		if _, err := fmt.Fprintln(w, line); err != nil {
			return err
		}
	}
	return nil
}

// colours reports whether colours are welcome; see no-color.org.
func colours() bool { return os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" }

// news is what a watch has to say: a snapshot, or why there is none.
type news struct {
	snapshot client.Snapshot
	err      error
}

// watchLive draws on the whole terminal until a key or ctx ends it.
func watchLive(ctx context.Context, agent client.Client, f topFlags, in, out *os.File) (err error) {
	// Ask once before the screen is taken, so that the usual trouble reads well.
	var last client.Snapshot
	if err := agent.Watch(ctx, 0, func(s client.Snapshot) error { last = s; return nil }); err != nil {
		return explainAgent(err, agent.Path, f.sockets)
	}
	last.Seconds = 0 // over whatever time the last one asked; wait for ours
	state, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return fmt.Errorf("prepare the terminal: %w", err)
	}
	defer func() { err = errors.Join(err, term.Restore(int(in.Fd()), state)) }()
	if _, err := out.WriteString(enterScreen); err != nil {
		return err
	}
	defer func() {
		_, leaveErr := out.WriteString(leaveScreen)
		err = errors.Join(err, leaveErr)
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	updates := make(chan news)
	go follow(ctx, agent, f.interval, updates)
	keys := make(chan key)
	go readKeys(ctx, in, keys)
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, syscall.SIGWINCH)
	defer signal.Stop(resized)
	v := &view{sort: byCPU, every: f.interval, colour: colours()}
	for {
		if err := draw(out, v, &last); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case n := <-updates:
			v.trouble = ""
			if n.err != nil {
				v.trouble = fmt.Sprintf("the agent does not answer (%s), trying again", reason(n.err))
			} else if n.snapshot.Seconds > 0 || last.Seconds == 0 {
				last = n.snapshot
			}
		case k, ok := <-keys:
			if !ok || !v.press(k) {
				return nil
			}
		case <-resized:
		}
	}
}

// follow sends what the agent says, and asks again when it ends.
func follow(ctx context.Context, agent client.Client, interval time.Duration, updates chan<- news) {
	send := func(n news) error {
		select {
		case updates <- n:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for ctx.Err() == nil {
		err := agent.Watch(ctx, interval, func(s client.Snapshot) error { return send(news{snapshot: s}) })
		if err == nil {
			err = errors.New("it ended")
		}
		if send(news{err: err}) != nil {
			return
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
}

// The alternate screen without a cursor, and back: xterm's private modes 1049
// and 25.
const (
	enterScreen = "\x1b[?1049h\x1b[?25l"
	leaveScreen = "\x1b[?25h\x1b[?1049l"
)

// draw paints the screen anew in one write, so that it does not flicker.
func draw(out *os.File, v *view, s *client.Snapshot) error {
	width, height, err := term.GetSize(int(out.Fd()))
	if err != nil {
		return fmt.Errorf("size of the terminal: %w", err)
	}
	v.width, v.height = max(width, 1), max(height, 1)
	picture := []byte("\x1b[H")
	for i, line := range v.lines(s) {
		if i > 0 {
			picture = append(picture, "\r\n"...)
		}
		picture = append(picture, "\x1b[2K"...) // before the text: after a full line it would take the last column
		picture = append(picture, line...)
	}
	_, err = out.Write(picture)
	return err
}

// key is what a key means to top.
type key int

const (
	keyQuit key = iota
	keyNext
	keyPrevious
	keyUp
	keyDown
	keyPageUp
	keyPageDown
)

// keyCodes are what terminals send; the longest that fits is meant.
var keyCodes = map[string]key{
	"q": keyQuit, "Q": keyQuit, "\x03": keyQuit, "\x04": keyQuit,
	"s": keyNext, "S": keyPrevious, "\x1b[C": keyNext, "\x1b[D": keyPrevious, "\x1bOC": keyNext, "\x1bOD": keyPrevious,
	"k": keyUp, "j": keyDown, "\x1b[A": keyUp, "\x1b[B": keyDown, "\x1bOA": keyUp, "\x1bOB": keyDown,
	"\x1b[5~": keyPageUp, "\x1b[6~": keyPageDown, " ": keyPageDown,
}

// readKeys sends the keys that are pressed, until in ends.
func readKeys(ctx context.Context, in io.Reader, keys chan<- key) {
	defer close(keys)
	buf := make([]byte, 64)
	for {
		n, err := in.Read(buf)
		for _, k := range parseKeys(string(buf[:n])) {
			select {
			case keys <- k:
			case <-ctx.Done():
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// parseKeys finds the keys in what a terminal sent. Others are skipped.
func parseKeys(s string) []key {
	var keys []key
	for len(s) > 0 {
		n := 1
		for l := min(4, len(s)); l > 0; l-- {
			if k, ok := keyCodes[s[:l]]; ok {
				keys = append(keys, k)
				n = l
				break
			}
		}
		s = s[n:]
	}
	return keys
}

// press reports whether to go on.
func (v *view) press(k key) bool {
	page := max(1, v.height/2)
	switch k {
	case keyQuit:
		return false
	case keyNext:
		v.sort = (v.sort + 1) % len(topColumns)
	case keyPrevious:
		v.sort = (v.sort + len(topColumns) - 1) % len(topColumns)
	case keyUp:
		v.first--
	case keyDown:
		v.first++
	case keyPageUp:
		v.first -= page
	case keyPageDown:
		v.first += page
	}
	return true
}
