//go:build lab

package ceilometer

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap/zaptest"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/ceilometer"
	"github.com/kvmeter/kvmeter/test/lab"
)

const secret = "the lab's sécret"

// nasty returns a message of a batch with what is hard to write and to sign.
func nasty(t *testing.T) (m bus.Message, samples int) {
	t.Helper()
	b := sample.NewBuilder()
	for i, row := range []sample.Row{
		{Resource: "5e1f0000-0000-4000-8000-000000000001", Project: "p", User: "u", Metadata: []byte(
			`{"display_name": "größe \"x\" 'y' \u2028 😀 \\", "flavor": {"name": "m1", "vcpus": 1, "extra_specs": {}}, "empty": [], "image": null}`)},
		{Resource: "r-vda", Metadata: []byte(`{"list": ["é", "it's", "\"q\"", "a\tb\u0000\u007f", 1.0, 1e22, -0.0, 1e-7, true, null, {"b": [1], "a": "x"}, [[]]], "a:b": 1, "Z": 2, "a": 3}`)},
		{Resource: "tap\xff-\xc3", Project: "p", Metadata: []byte(`{"n": 123456789012345678901234567890, "f": 12345678901234567.5}`)},
		{Resource: "none"},
	} {
		row.Source = "openstack"
		row.Offset = int64(i)
		b.Row(row)
		b.Add(sample.CPU.MeterRef, sample.Walk, sample.Uint(1<<64-1-uint64(i)))
		b.Add(sample.MeterRef{Name: "memory.usage", Kind: sample.Gauge, Unit: "MiB"}, sample.Libvirt, sample.Float([]float64{0, 1e16, 1e-5, 51.0078125}[i]))
		b.Add(sample.MeterRef{Name: "temperature", Kind: sample.Gauge, Unit: "°C"}, sample.IPMI, sample.Int(-1<<63))
	}
	built := b.Build()
	built.ID, built.Node, built.Epoch, built.Seq, built.Base = sample.NewBatchID(time.Now()), "n", 1, 1, 1_800_000_000_000_000
	enc, err := sample.NewEncoder()
	if err != nil {
		t.Fatal(err)
	}
	body, err := enc.Encode(nil, built)
	if err != nil {
		t.Fatal(err)
	}
	return bus.Seal("samples.0", built, body, nil), built.Len()
}

// python runs a script of testdata and returns what it prints.
func python(t *testing.T, in []byte, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/usr/bin/python3", args...)
	cmd.Stdin = bytes.NewReader(in)
	var out, wrong bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &wrong
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, wrong.Bytes())
	}
	if wrong.Len() > 0 {
		t.Logf("%v: %s", args, wrong.Bytes())
	}
	return out.Bytes()
}

// TestNotificationAgentWritesTheSame has Ceilometer's notification agent take what
// is sent by this package, and then the same samples sent by Ceilometer's own code,
// and compares what it writes. All signatures must hold by Ceilometer's code.
func TestNotificationAgentWritesTheSame(t *testing.T) {
	broker, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		change func(*Config)
		conf   string // the agent's
	}{
		"as by default": {func(*Config) {}, ""},
		"in quorum queues of another exchange": {
			func(c *Config) {
				c.ControlExchange, c.Topics = "other", []string{"billing", "copied"}
				c.DurableQueues, c.QueueArguments = true, map[string]any{"x-queue-type": "quorum", "x-delivery-limit": 7}
			}, "[DEFAULT]\ncontrol_exchange = other\n[notification]\nnotification_control_exchanges = other\n" +
				"[oslo_messaging_notifications]\ntopics = billing\n[oslo_messaging_rabbit]\nrabbit_quorum_queue = true\nrabbit_quorum_delivery_limit = 7\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := DefaultConfig()
			cfg.TelemetrySecret, cfg.BatchSize, cfg.Topics = secret, 5, []string{"notifications", "copy"}
			tc.change(&cfg)
			b, err := NewBus(cfg, bus.Config{URL: broker.URL()}, zaptest.NewLogger(t))
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			m, samples := nasty(t)
			if err := open(t, cfg, b).Publish(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			bodies := drain(t, broker.URL(), cfg.Topics[1]+".sample")
			var verified struct{ Good, Bad int }
			if err := json.Unmarshal(python(t, bodies, "testdata/verify.py", secret), &verified); err != nil || verified.Good != samples || verified.Bad != 0 {
				t.Errorf("%d signatures hold and %d do not, want %d and 0 (%v)", verified.Good, verified.Bad, samples, err)
			}
			conf, file := ceilometer.StartNotification(t, broker.URL(), secret, tc.conf)
			ours := lines(t, file, samples)
			python(t, bodies, "testdata/send.py", conf)
			theirs := lines(t, file, 2*samples)[samples:]
			slices.Sort(ours)
			slices.Sort(theirs)
			if diff := cmp.Diff(theirs, ours); diff != "" {
				t.Errorf("-sent by Ceilometer's code +sent by kvmeter:\n%s", diff)
			}
		})
	}
}

// drain takes all messages out of a queue and returns their bodies, one a line.
func drain(t *testing.T, url, queue string) (bodies []byte) {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	for {
		d, ok, err := ch.Get(queue, true)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return bodies
		}
		bodies = append(append(bodies, d.Body...), '\n')
	}
}

// lines waits until a file has so many lines.
func lines(t *testing.T, file string, n int) []string {
	t.Helper()
	deadline := time.Now().Add(90 * time.Second)
	for {
		data, err := os.ReadFile(file)
		got := strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
		if err == nil && bytes.Count(data, []byte("\n")) >= n {
			return got
		}
		if time.Now().After(deadline) {
			t.Fatalf("the file has %d lines, want %d: %v\n%s", bytes.Count(data, []byte("\n")), n, err, data)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
