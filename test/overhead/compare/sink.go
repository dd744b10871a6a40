package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/ceilometer"
)

// tally counts what a contender delivers, and how old it is.
type tally struct {
	mu       sync.Mutex
	interval time.Duration
	counts   delivered
	last     map[string]arrival
	totals   map[string]float64 // newest value by meter and resource
	failed   error
}

// delivered is what has come since the tally was reset.
type delivered struct {
	messages, bytes, samples, late int
	delay                          []float64 // s from the reading to the arrival
	age                            []float64 // s, of a series' newest value just before the next one came
}

type arrival struct{ read, came time.Time }

func newTally(interval time.Duration) *tally {
	return &tally{interval: interval, last: map[string]arrival{}, totals: map[string]float64{}}
}

// message counts one.
func (t *tally) message(size int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts.messages++
	t.counts.bytes += size
}

// sample notes one of a series. It is late where it comes half an interval after
// it was due.
func (t *tally) sample(series string, value float64, read, came time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts.samples++
	t.counts.delay = append(t.counts.delay, came.Sub(read).Seconds())
	if last, ok := t.last[series]; ok {
		if came.Sub(last.came) > t.interval*3/2 {
			t.counts.late++
		}
		t.counts.age = append(t.counts.age, came.Sub(last.read).Seconds())
	}
	t.last[series] = arrival{read, came}
	t.totals[series] = value
}

func (t *tally) fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.failed = err
}

// reset returns what was counted since the last one.
func (t *tally) reset() (delivered, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	d := t.counts
	t.counts = delivered{}
	return d, t.failed
}

// come reports how many samples there are since the last reset.
func (t *tally) come() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.counts.samples
}

// sink takes what a contender delivers until it is closed.
type sink interface{ Close() error }

// queueSink consumes from a queue; read reads each message.
func queueSink(broker, queue string, t *tally, declare func(*amqp.Channel) error, read func(body []byte, came time.Time) error) (sink, error) {
	conn, err := amqp.Dial(broker)
	if err != nil {
		return nil, err
	}
	ch, err := conn.Channel()
	if err == nil {
		err = declare(ch)
	}
	if err == nil {
		_, err = ch.QueuePurge(queue, false)
	}
	var messages <-chan amqp.Delivery
	if err == nil {
		messages, err = ch.Consume(queue, "", true, false, false, false, nil)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	go func() {
		for m := range messages {
			came := time.Now()
			t.message(len(m.Body))
			if err := read(m.Body, came); err != nil {
				t.fail(err)
			}
		}
	}()
	return conn, nil
}

// batchSink takes kvmeter's batches.
func batchSink(broker string, t *tally) (sink, error) {
	decoder, err := sample.NewDecoder()
	if err != nil {
		return nil, err
	}
	return queueSink(broker, bus.SamplesQueue(0), t, func(*amqp.Channel) error { return declare(broker) },
		func(body []byte, came time.Time) error {
			b, err := decoder.Decode(body)
			if err != nil {
				return err
			}
			for s := range b.Samples() {
				t.sample(s.Name+" "+s.Resource, s.Volume.Float64(), time.UnixMicro(s.Time), came)
			}
			return nil
		})
}

// declare makes kvmeter's topology.
func declare(broker string) error {
	b, err := bus.NewAMQP(bus.Config{URL: broker, Partitions: 1}, "compare", zap.NewNop())
	if err != nil {
		return err
	}
	defer b.Close()
	return b.Ping(context.Background())
}

// pollingSink takes what Ceilometer's polling agent sends.
func pollingSink(broker string, t *tally) (sink, error) {
	const queue = "notifications.sample"
	return queueSink(broker, queue, t, func(ch *amqp.Channel) error {
		if err := ch.ExchangeDeclare("ceilometer", "topic", false, false, false, false, nil); err != nil {
			return err
		}
		if _, err := ch.QueueDeclare(queue, false, false, false, false, nil); err != nil {
			return err
		}
		return ch.QueueBind(queue, queue, "ceilometer", false, nil)
	}, func(body []byte, came time.Time) error {
		samples, err := ceilometer.Decode(body)
		if err != nil {
			return err
		}
		for _, s := range samples {
			read, err := time.Parse("2006-01-02T15:04:05.999999", s.Timestamp)
			if err != nil {
				return err
			}
			v, err := s.Volume.Float64()
			if err != nil {
				return err
			}
			t.sample(s.Name+" "+s.Resource, v, read, came)
		}
		return nil
	})
}

// scrapeSink fetches an exporter's page once an interval, as Prometheus does.
func scrapeSink(url, prefix string, t *tally) sink {
	ctx, stop := context.WithCancel(context.Background())
	s := &scraper{stop: stop}
	s.done.Go(func() {
		tick := time.NewTicker(t.interval)
		defer tick.Stop()
		for {
			if err := scrape(ctx, url, prefix, t); err != nil && ctx.Err() == nil && t.come() > 0 {
				t.fail(err)
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	return s
}

type scraper struct {
	stop context.CancelFunc
	done sync.WaitGroup
}

func (s *scraper) Close() error {
	s.stop()
	s.done.Wait()
	return nil
}

func scrape(ctx context.Context, url, prefix string, t *tally) error {
	begun := time.Now()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept-Encoding", "gzip")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	t.message(len(body))
	if res.Header.Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(bytes.NewReader(body))
		if err != nil {
			return err
		}
		if body, err = io.ReadAll(z); err != nil {
			return err
		}
	}
	came := time.Now()
	for line := range strings.Lines(string(body)) {
		if !strings.HasPrefix(line, prefix) {
			continue
		}
		series, text, _ := strings.Cut(strings.TrimSpace(line), "} ")
		var v float64
		if _, err := fmt.Sscan(text, &v); err != nil {
			return fmt.Errorf("scraped %q: %w", line, err)
		}
		t.sample(series, v, begun, came)
	}
	return nil
}

// networkSink takes what collectd's plugin network sends over UDP.
func networkSink(conn net.PacketConn, t *tally) sink {
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, _, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			t.message(n)
			if err := readCollectd(buf[:n], time.Now(), t); err != nil {
				t.fail(err)
			}
		}
	}()
	return conn
}

// readCollectd reads a packet of collectd's binary protocol: parts of a type, a
// length and a content, where those that name the host, the plugin and so on
// hold for all that follows.
func readCollectd(packet []byte, came time.Time, t *tally) error {
	const (
		host, plugin, pluginInstance, kind, kindInstance = 0, 2, 3, 4, 5
		values, timeHR                                   = 6, 8
	)
	names := [6]string{}
	read := came
	for len(packet) > 0 {
		if len(packet) < 4 {
			return fmt.Errorf("collectd: a part of %d bytes", len(packet))
		}
		part, size := binary.BigEndian.Uint16(packet), int(binary.BigEndian.Uint16(packet[2:]))
		if size < 4 || size > len(packet) {
			return fmt.Errorf("collectd: a part of %d bytes, of which %d are there", size, len(packet))
		}
		body := packet[4:size]
		packet = packet[size:]
		switch part {
		case host, plugin, pluginInstance, kind, kindInstance:
			names[part] = string(bytes.TrimRight(body, "\x00"))
		case timeHR: // in units of 2^-30 s
			hr := binary.BigEndian.Uint64(body)
			read = time.Unix(int64(hr>>30), int64((hr&(1<<30-1))*1e9>>30))
		case values:
			n := int(binary.BigEndian.Uint16(body))
			for i := range n {
				raw := body[2+n+8*i:]
				v := float64(binary.BigEndian.Uint64(raw))
				if body[2+i] == 1 { // a gauge
					v = math.Float64frombits(binary.LittleEndian.Uint64(raw))
				}
				name := strings.Join(strings.Fields(strings.Join(names[:], " ")), " ") // without those that are empty
				t.sample(fmt.Sprintf("%s %d", name, i), v, read, came)
			}
		}
	}
	return nil
}
