// Package client speaks to an agent over its local socket.
package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Snapshot is what GET /v1/domains answers: one JSON document a line, every
// watch interval where watch is asked for.
type Snapshot struct {
	Node    string    `json:"node"`
	Time    time.Time `json:"time"`
	Seconds float64   `json:"seconds"` // what the rates are over; 0 in the first snapshot
	Domains []Domain  `json:"domains"`
	Notes   []string  `json:"notes,omitempty"` // what cannot be collected, and why
}

// Domain is one domain's use since the previous snapshot.
type Domain struct {
	UUID    string `json:"uuid"`
	Name    string `json:"name"`
	Display string `json:"display_name,omitempty"` // Nova's name of the instance
	Project string `json:"project_id,omitempty"`
	PID     int    `json:"pid"`
	VCPUs   int    `json:"vcpus"`
	// Percent of one CPU: 200 is two vCPUs that never rest.
	CPU     float64 `json:"cpu_percent"`
	Wait    float64 `json:"wait_percent"`
	Process float64 `json:"process_percent"`
	// Bytes and requests a second. Requests are QEMU's, at libvirt's cadence;
	// null until they were read twice.
	DiskRead  float64  `json:"disk_read_bytes_per_second"`
	DiskWrite float64  `json:"disk_write_bytes_per_second"`
	DiskIOPS  *float64 `json:"disk_requests_per_second"`
	NetIn     float64  `json:"net_in_bytes_per_second"`
	NetOut    float64  `json:"net_out_bytes_per_second"`
	Origin    string   `json:"origin"` // who counted the CPU
	Error     string   `json:"error,omitempty"`
}

// Client reads from the socket at Path.
type Client struct{ Path string }

// Hook is a BPF hook of the agent.
type Hook struct {
	Name       string `json:"name"`
	On         bool   `json:"on"`
	Fault      string `json:"fault,omitempty"` // why it does not count all that it should
	Events     uint64 `json:"events"`          // bytes (disk), packets (tcx), switches (runqueue) or exits (exits) counted
	Misses     uint64 `json:"misses"`          // runs that the kernel skipped
	Dropped    uint64 `json:"dropped"`         // events not counted because a map was full
	Orphans    uint64 `json:"orphans"`         // events of which only the beginning or the end was seen
	Entries    int    `json:"map_entries"`     // of its fullest map
	MaxEntries int    `json:"map_max_entries"`
}

// Hooks returns the hooks that the agent could open.
func (c Client) Hooks(ctx context.Context) ([]Hook, error) {
	var hooks []Hook
	err := c.ask(ctx, http.MethodGet, "/v1/hooks", func(body io.Reader) error {
		return json.NewDecoder(body).Decode(&hooks)
	})
	return hooks, err
}

// Switch switches a hook on or off, until the agent ends.
func (c Client) Switch(ctx context.Context, hook string, on bool) error {
	return c.ask(ctx, http.MethodPut, "/v1/hooks/"+url.PathEscape(hook)+"?on="+strconv.FormatBool(on), nil)
}

// PID returns the PID of the agent.
func (c Client) PID() (int, error) {
	conn, err := net.Dial("unix", c.Path)
	if err != nil {
		return 0, fmt.Errorf("ask the agent at %s: %w", c.Path, err)
	}
	defer func() { _ = conn.Close() }()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil || err != nil {
		return 0, fmt.Errorf("find out who answers at %s: %w", c.Path, errors.Join(cerr, err))
	}
	return int(peer.Pid), nil
}

// Watch calls each with a snapshot every interval until ctx ends, the agent
// does, or each returns an error. An interval of zero asks for one snapshot.
func (c Client) Watch(ctx context.Context, interval time.Duration, each func(Snapshot) error) error {
	path := "/v1/domains"
	if interval > 0 {
		path += "?watch=" + interval.String()
	}
	err := c.ask(ctx, http.MethodGet, path, func(body io.Reader) error {
		lines := bufio.NewScanner(body)
		lines.Buffer(nil, 16<<20)
		for lines.Scan() {
			var s Snapshot
			if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
				return err
			}
			if err := each(s); err != nil {
				return stopped{err}
			}
		}
		return lines.Err()
	})
	if stop, ok := errors.AsType[stopped](err); ok {
		return stop.error
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// stopped is an error of who reads, not of the agent.
type stopped struct{ error }

// ask sends a request and has read the answer's body, unless read is nil.
func (c Client) ask(ctx context.Context, method, path string, read func(io.Reader) error) error {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", c.Path)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return fmt.Errorf("ask the agent at %s: %w", c.Path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode >= http.StatusMultipleChoices {
		why, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		if err != nil || len(why) == 0 {
			why = []byte(resp.Status)
		}
		return fmt.Errorf("ask the agent at %s: %s (%d)", c.Path, strings.TrimSpace(string(why)), resp.StatusCode)
	}
	if read == nil {
		return nil
	}
	if err := read(resp.Body); err != nil {
		return fmt.Errorf("read the agent's answer: %w", err)
	}
	return nil
}

// Crosscheck is what GET and POST /v1/crosscheck answer: how the agent's
// figures compared with libvirt's when each domain was checked last. POST checks
// first. ?domain= names one domain, by its UUID or a name.
type Crosscheck struct {
	Node     string         `json:"node"`
	Interval float64        `json:"interval_seconds"` // between two checks of a domain; 0: they are made on request only
	Domains  []CheckedGuest `json:"domains"`
	Notes    []string       `json:"notes,omitempty"` // why nothing is checked
}

// CheckedGuest is a domain and its last check.
type CheckedGuest struct {
	UUID        string       `json:"uuid"`
	Name        string       `json:"name"`
	Display     string       `json:"display_name,omitempty"` // Nova's name of the instance
	Time        *time.Time   `json:"time"`                   // of the check; null: there was none yet
	Comparisons []Comparison `json:"comparisons"`
}

// Comparison is a meter as the agent and libvirt counted it.
type Comparison struct {
	Meter    string   `json:"meter"`
	Resource string   `json:"resource_id"`
	Device   string   `json:"device,omitempty"` // of a NIC or disk, such as tap0
	Unit     string   `json:"unit"`
	Verdict  string   `json:"verdict"`       // agrees, differs or not comparable
	Why      string   `json:"why,omitempty"` // where they are not
	Figures  *Figures `json:"figures"`       // null where they are not
}

// Figures are what both have counted, in the meter's unit.
type Figures struct {
	Ours       uint64     `json:"kvmeter"`
	Theirs     uint64     `json:"libvirt"`
	Difference int64      `json:"difference"` // libvirt's less kvmeter's
	Relative   float64    `json:"relative"`   // in parts of the greater one
	Tolerance  uint64     `json:"tolerance"`  // how great the difference may be
	Since      *time.Time `json:"since"`      // when both began to count; null: with the counter itself
}

// Crosscheck asks for the comparisons of a domain, or with "" of all. Where now
// is set they are made now.
func (c Client) Crosscheck(ctx context.Context, domain string, now bool) (s Crosscheck, err error) {
	method, path := http.MethodGet, "/v1/crosscheck"
	if now {
		method = http.MethodPost
	}
	if domain != "" {
		path += "?domain=" + url.QueryEscape(domain)
	}
	err = c.ask(ctx, method, path, func(body io.Reader) error { return json.NewDecoder(body).Decode(&s) })
	return s, err
}
