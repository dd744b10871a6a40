// Package ceilometer runs OpenStack Telemetry's own programs, as Debian packages
// them, beside kvmeter's.
package ceilometer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Packages of Debian that [Agent] needs.
const Packages = "python3-ceilometer python3-libvirt"

// Secret is the telemetry_secret of [Agent].
const Secret = "lab-secret"

// Sample is a sample as Ceilometer's polling agent sends it.
type Sample struct {
	ID        string          `json:"message_id"`
	Name      string          `json:"counter_name"`
	Type      string          `json:"counter_type"`
	Unit      string          `json:"counter_unit"`
	Volume    json.Number     `json:"counter_volume"`
	Resource  string          `json:"resource_id"`
	Project   string          `json:"project_id"`
	User      string          `json:"user_id"`
	Source    string          `json:"source"`
	Timestamp string          `json:"timestamp"`
	Metadata  json.RawMessage `json:"resource_metadata"`
}

// Agent is a ceilometer-polling of the namespace compute.
type Agent struct {
	Host     string            // its name
	Libvirt  string            // path of libvirt's socket
	Broker   string            // AMQP URL of a RabbitMQ
	Interval time.Duration     // between polls, in whole seconds
	Meters   []string          // names and patterns
	Flavors  map[string]string // ids by name, as a Nova API would tell
}

const agentConf = `[DEFAULT]
host = %s
transport_url = %s
libvirt_uri = qemu+unix:///system?socket=%s
log_file = %s
state_path = %s
[polling]
cfg_file = %s
[compute]
instance_discovery_method = libvirt_metadata
[publisher]
telemetry_secret = %s
[service_credentials]
auth_type = none
endpoint = http://%s
`

// Command returns the agent, to be run with a ceilometer.conf and a polling.yaml in
// the folder dir, and what ends the Nova API that it asks meanwhile.
func (a *Agent) Command(dir string) (cmd *exec.Cmd, done func() error, err error) {
	bin, err := exec.LookPath("ceilometer-polling")
	if err != nil {
		return nil, nil, fmt.Errorf("%w: apt-get install %s", err, Packages)
	}
	nova, err := a.serveNova()
	if err != nil {
		return nil, nil, err
	}
	conf, polling, log := filepath.Join(dir, "ceilometer.conf"), filepath.Join(dir, "polling.yaml"), filepath.Join(dir, "ceilometer.log")
	text := fmt.Sprintf(agentConf, a.Host, strings.Replace(a.Broker, "amqp:", "rabbit:", 1), url.QueryEscape(a.Libvirt), log, dir, polling, Secret, nova.addr)
	sources, err := json.Marshal(map[string]any{"sources": []any{map[string]any{"name": "all", "interval": int(a.Interval.Seconds()), "meters": a.Meters}}})
	if err = errors.Join(err, os.WriteFile(conf, []byte(text), 0o644), os.WriteFile(polling, sources, 0o644)); err != nil {
		return nil, nil, errors.Join(err, nova.Close())
	}
	return exec.Command(bin, "--config-file", conf, "--polling-namespaces", "compute"), nova.Close, nil
}

// Poll runs the agent in the folder dir, with a ceilometer.conf and a polling.yaml
// that stay there, until it has sent what it has to say
// rounds times, and returns the last of these rounds.
func (a *Agent) Poll(ctx context.Context, dir string, rounds int) (samples []Sample, err error) {
	cmd, done, err := a.Command(dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	tap, err := NewTap(a.Broker)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, tap.Close()) }()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start Ceilometer's agent: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	samples, err = tap.rounds(ctx, rounds)
	_ = cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		_ = cmd.Process.Kill()
		<-ended
	}
	if err != nil {
		said, _ := os.ReadFile(filepath.Join(dir, "ceilometer.log"))
		return nil, fmt.Errorf("%w; its log ends:\n%s", err, said[max(0, len(said)-4000):])
	}
	return samples, nil
}

// Tap gets a copy of all that polling agents send to a broker.
type Tap struct {
	conn  *amqp.Connection
	ch    *amqp.Channel
	queue string

	// Bodies are the messages that were read, a line each.
	Bodies []byte
}

// NewTap makes the exchange as an agent would, and a queue of its own.
func NewTap(broker string) (*Tap, error) {
	conn, err := amqp.Dial(broker)
	if err != nil {
		return nil, err
	}
	const exchange = "ceilometer"
	t := &Tap{conn: conn}
	if t.ch, err = conn.Channel(); err == nil {
		err = t.ch.ExchangeDeclare(exchange, "topic", false, false, false, false, nil)
	}
	if err == nil {
		var q amqp.Queue
		q, err = t.ch.QueueDeclare("", false, true, true, false, nil)
		t.queue = q.Name
	}
	if err == nil {
		err = t.ch.QueueBind(t.queue, "notifications.sample", exchange, false, nil)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return t, nil
}

// Close ends the tap.
func (t *Tap) Close() error { return t.conn.Close() }

// Next returns the samples of the next message, as soon as there is one.
func (t *Tap) Next(ctx context.Context) ([]Sample, error) {
	for {
		d, ok, err := t.ch.Get(t.queue, true)
		if err != nil {
			return nil, err
		}
		if ok {
			t.Bodies = append(append(t.Bodies, d.Body...), '\n')
			return Decode(d.Body)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// rounds reads until each series that came at all came n times, and returns its
// last sample.
func (t *Tap) rounds(ctx context.Context, n int) ([]Sample, error) {
	type series struct{ name, resource string }
	last, count := map[series]Sample{}, map[series]int{}
	for {
		all, err := t.Next(ctx)
		if err != nil {
			return nil, fmt.Errorf("only %d series came: %w", len(count), err)
		}
		for _, s := range all {
			k := series{s.Name, s.Resource}
			last[k] = s
			count[k]++
		}
		least, most := n, 0
		for _, c := range count {
			least, most = min(least, c), max(most, c)
		}
		// A series that is one round behind may be about to come.
		if least < n && most < n+2 {
			continue
		}
		samples := make([]Sample, 0, len(last))
		for _, s := range last {
			samples = append(samples, s)
		}
		return samples, nil
	}
}

// Decode reads a message of oslo.messaging.
func Decode(body []byte) ([]Sample, error) {
	var envelope struct {
		Message string `json:"oslo.message"`
	}
	var message struct {
		Payload struct{ Samples []Sample }
	}
	err := json.Unmarshal(body, &envelope)
	if err == nil {
		err = json.Unmarshal([]byte(envelope.Message), &message)
	}
	if err != nil {
		return nil, fmt.Errorf("read what the agent sent: %w", err)
	}
	return message.Payload.Samples, nil
}

// nova is as much of Nova's API as the agent asks: the ids of flavors.
type nova struct {
	addr string
	srv  http.Server
	done sync.WaitGroup
}

func (a *Agent) serveNova() (*nova, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	type flavor struct {
		ID    string   `json:"id"`
		Name  string   `json:"name"`
		Links []string `json:"links"`
	}
	flavors := []flavor{}
	for name, id := range a.Flavors {
		flavors = append(flavors, flavor{id, name, []string{}})
	}
	n := &nova{addr: l.Addr().String()}
	n.srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if strings.HasSuffix(r.URL.Path, "/flavors") {
			_ = json.NewEncoder(w).Encode(map[string]any{"flavors": flavors})
			return
		}
		for _, f := range flavors {
			if strings.HasSuffix(r.URL.Path, "/flavors/"+f.ID) {
				_ = json.NewEncoder(w).Encode(map[string]any{"flavor": f})
				return
			}
		}
		http.Error(w, `{}`, http.StatusNotFound)
	})
	n.done.Go(func() { _ = n.srv.Serve(l) })
	return n, nil
}

func (n *nova) Close() error {
	err := n.srv.Close()
	n.done.Wait()
	return err
}
