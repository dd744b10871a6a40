// Package client speaks to an agent over its local socket.
package client

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"time"
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

// Watch calls each with a snapshot every interval until ctx ends, the agent
// does, or each returns an error. An interval of zero asks for one snapshot.
func (c Client) Watch(ctx context.Context, interval time.Duration, each func(Snapshot) error) error {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", c.Path)
	}}
	defer transport.CloseIdleConnections()
	url := "http://agent/v1/domains"
	if interval > 0 {
		url += "?watch=" + interval.String()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return fmt.Errorf("ask the agent at %s: %w", c.Path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("ask the agent at %s: %s", c.Path, resp.Status)
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var s Snapshot
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			return fmt.Errorf("read the agent's answer: %w", err)
		}
		if err := each(s); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("read the agent's answer: %w", err)
	}
	return ctx.Err()
}
