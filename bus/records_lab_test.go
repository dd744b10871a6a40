//go:build lab

package bus_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/test/lab"
)

func TestMain(m *testing.M) {
	if os.Getenv("BUS_TEST_WRITER") != "" {
		writer()
		return
	}
	goleak.VerifyTestMain(m)
}

func texts(records [][]byte) (all []string) {
	for _, r := range records {
		all = append(all, string(r))
	}
	return all
}

// TestRecordsAreOneNotifiersAtATime has one after the other recall the records of
// a partition, over a restart of the broker.
func TestRecordsAreOneNotifiersAtATime(t *testing.T) {
	broker, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	client := func() *bus.AMQP {
		b, err := bus.NewAMQP(bus.Config{URL: broker.URL(), Stages: 2}, t.Name(), zap.NewNop())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(b.Close)
		return b
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	recall := func(want ...string) *bus.Records {
		t.Helper()
		b := client()
		var r *bus.Records
		var got [][]byte
		for {
			var err error
			if r, got, err = b.Recall(ctx, 1); err == nil {
				break
			}
			if ctx.Err() != nil { // else a queue may not be ready yet
				t.Error(err)
				return nil
			}
			time.Sleep(100 * time.Millisecond)
		}
		if diff := cmp.Diff(want, texts(got)); diff != "" {
			t.Errorf("records (-want +got):\n%s", diff)
		}
		return r
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	record := func(texts ...string) (all [][]byte) {
		for _, s := range texts {
			all = append(all, []byte(s))
		}
		return all
	}
	first := recall()
	do(first.Replace(ctx, nil))
	do(first.Append(ctx, []byte("a")))
	do(first.Append(ctx, []byte("b")))

	// The next one waits until the first is gone, and gets what it has written
	// meanwhile.
	second := make(chan *bus.Records)
	go func() { second <- recall("a", "b", "c") }()
	time.Sleep(500 * time.Millisecond) // about when it has begun to wait; it may be later
	do(first.Append(ctx, []byte("c")))
	select {
	case <-second:
		t.Fatal("two have the records")
	default:
	}
	do(first.Close())
	r := <-second
	if err := first.Append(ctx, []byte("too late")); err == nil {
		t.Error("one that has let go can still write")
	}
	do(r.Replace(ctx, record("all 1", "all 2")))
	do(r.Append(ctx, []byte("d")))
	do(r.Replace(ctx, record("all 3")))
	do(r.Append(ctx, []byte("e")))
	do(r.Close())
	r = recall("all 3", "e") // which it has not replaced
	do(r.Close())
	r = recall("all 3", "e")
	do(r.Replace(ctx, record("all 4")))

	// In good order: RabbitMQ 3.10 may lose a queue whose declaration is seconds old
	// when it is killed.
	do(broker.Stop(ctx))
	<-r.Lost()
	if err := r.Append(ctx, []byte("lost")); err == nil {
		t.Error("one that has lost the broker can still write")
	}
	do(r.Close())
	do(broker.Start(ctx))
	if r = recall("all 4"); r == nil {
		t.FailNow()
	}

	// More than RabbitMQ hands out at once unless it is asked to.
	var want []string
	for i := range 2200 {
		want = append(want, fmt.Sprint(i))
	}
	do(r.Replace(ctx, record(want...)))
	do(r.Append(ctx, []byte("one more")))
	do(r.Close())
	if r = recall(append(want, "one more")...); r != nil {
		do(r.Close())
	}
}

// writer is a process that has the records and writes numbers, each after the one
// before is confirmed, and says so; every tenth time it writes all anew.
func writer() {
	b, err := bus.NewAMQP(bus.Config{URL: os.Getenv("URL"), Stages: 1}, "writer", zap.NewNop())
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	r, records, err := b.Recall(ctx, 0)
	if err != nil {
		panic(err)
	}
	all := slices.Clone(records)
	if err := r.Replace(ctx, all); err != nil {
		panic(err)
	}
	for {
		next := fmt.Append(nil, len(all))
		if err := r.Append(ctx, next); err != nil {
			panic(err)
		}
		all = append(all, next)
		fmt.Println(len(all))
		if len(all)%10 == 0 {
			if err := r.Replace(ctx, all); err != nil {
				panic(err)
			}
		}
	}
}

// TestNoConfirmedRecordIsLostWhoeverDies kills writers, stops one for longer than
// the next one needs, and looks that each number was written once, in order.
func TestNoConfirmedRecordIsLostWhoeverDies(t *testing.T) {
	broker, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	confirmed := 0
	for life := range 8 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "BUS_TEST_WRITER=1", "URL="+broker.URL())
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := 0
		n := 0
		for lines < 5+7*life {
			if _, err := fmt.Fscan(out, &n); err != nil {
				t.Fatal(err)
			}
			lines++
		}
		_ = cmd.Process.Kill()
		for { // what it still said
			if _, err := fmt.Fscan(out, &n); err != nil {
				break
			}
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("the writer ended with %v", err)
		}
		if n < confirmed {
			t.Fatalf("life %d has %d records, %d were confirmed before", life, n, confirmed)
		}
		confirmed = n
	}
	b, err := bus.NewAMQP(bus.Config{URL: broker.URL(), Stages: 1}, t.Name(), zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	r, records, err := b.Recall(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	var want []string
	for i := range len(records) {
		want = append(want, fmt.Sprint(i))
	}
	if got := texts(records); len(got) < confirmed || len(got) > confirmed+1 || strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("%d were confirmed, there are %v", confirmed, got)
	}
}
