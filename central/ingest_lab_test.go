//go:build lab

package central_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/kvmeter/kvmeter/bus"
	"github.com/kvmeter/kvmeter/central"
	"github.com/kvmeter/kvmeter/central/store"
	"github.com/kvmeter/kvmeter/sample"
	"github.com/kvmeter/kvmeter/test/lab"
)

func TestMain(m *testing.M) {
	if os.Getenv("CENTRAL_TEST_CHILD") != "" {
		runIngest()
		return
	}
	goleak.VerifyTestMain(m)
}

// ledger is a store that writes the seq of each batch to a file, and dies, with
// its process, right after it has synced for the nth time.
type ledger struct {
	f    *os.File
	seen map[uint64]bool
	left int
}

func openLedger(path string, left int) (*ledger, error) {
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l := &ledger{seen: map[uint64]bool{}, left: left}
	for line := range strings.FieldsSeq(string(data)) {
		seq, err := strconv.ParseUint(line, 10, 64)
		if err != nil {
			return nil, err
		}
		l.seen[seq] = true
	}
	l.f, err = os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	return l, err
}

func (l *ledger) Append(_ context.Context, batches []store.Received) ([]store.Stored, error) {
	out := make([]store.Stored, len(batches))
	var text []byte
	for i, r := range batches {
		if out[i].Duplicate = l.seen[r.Batch.Seq]; out[i].Duplicate {
			fmt.Println("duplicate", r.Batch.Seq)
			continue
		}
		l.seen[r.Batch.Seq] = true
		text = fmt.Appendln(text, r.Batch.Seq)
	}
	if _, err := l.f.Write(text); err != nil {
		return nil, err
	}
	if err := l.f.Sync(); err != nil {
		return nil, err
	}
	if l.left--; l.left == 0 {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	return out, nil
}

func (l *ledger) AppendEvents(context.Context, []sample.Event) ([]store.Stored, error) {
	return nil, errors.New("this test has no events")
}

// runIngest is the ingest as a process of its own.
func runIngest() {
	b, err := bus.NewAMQP(bus.Config{URL: os.Getenv("URL")}, "central", zap.NewExample())
	if err != nil {
		panic(err)
	}
	lives, _ := strconv.Atoi(os.Getenv("APPENDS"))
	l, err := openLedger(os.Getenv("LEDGER"), lives)
	if err != nil {
		panic(err)
	}
	cfg := central.DefaultIngestConfig()
	cfg.Prefetch = 5
	in, err := central.NewIngest(cfg, central.IngestDeps{Log: zap.NewExample(), Consumer: b, Store: l, Keys: keys})
	if err != nil {
		panic(err)
	}
	panic(in.Run(context.Background()))
}

func TestAnIngestKilledBetweenSyncAndAckStoresEachBatchOnce(t *testing.T) {
	broker, err := lab.Start(t, lab.Options{}).RabbitMQ(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := bus.NewAMQP(bus.Config{URL: broker.URL()}, t.Name(), zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	const batches = 100
	var ms []bus.Message
	for seq := range uint64(batches) {
		ms = append(ms, sealed(t, seq, 1))
	}
	unsigned := sealed(t, 1000, 1)
	unsigned.KeyID, unsigned.HMAC = "", ""
	garbage := sealed(t, 1001, 1)
	garbage.Body = []byte("garbage")
	ms = append(ms[:50], append([]bus.Message{unsigned, garbage}, ms[50:]...)...)
	if err := b.Publish(t.Context(), ms...); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "ledger")
	duplicates := 0
	for life := 1; life <= 7; life++ {
		appends := life
		if life == 7 {
			appends = 0 // the last one stays alive
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "CENTRAL_TEST_CHILD=1", "URL="+broker.URL(), "LEDGER="+path, fmt.Sprint("APPENDS=", appends))
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if appends == 0 {
			waitStored(t, path, batches)
			_ = cmd.Process.Kill()
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("the ingest ended with %v\n%s", err, &out)
		}
		duplicates += strings.Count(out.String(), "duplicate")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	for seq := range strings.FieldsSeq(string(data)) {
		count[seq]++
	}
	for seq := range batches {
		if n := count[fmt.Sprint(seq)]; n != 1 {
			t.Errorf("batch %d was stored %d times", seq, n)
		}
	}
	if len(count) != batches || duplicates == 0 {
		t.Errorf("%d batches stored, want %d; %d came again, want some", len(count), batches, duplicates)
	}
	t.Logf("%d batches, killed 6 times, %d came again", len(count), duplicates)
	reasons := map[string]bool{}
	ch := channel(t, broker.URL())
	for {
		d, ok, err := ch.Get("kvmeter.dead", true)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			break
		}
		reason, _ := d.Headers["kvmeter-reason"].(string)
		reasons[reason] = true
	}
	if !reasons["batch is not signed"] || !reasons["signature does not match"] || len(reasons) != 2 {
		t.Errorf("reasons of dead letters %v", reasons)
	}
}

func channel(t *testing.T, url string) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

// waitStored waits until n batches are in the ledger.
func waitStored(t *testing.T, path string, n int) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		data, err := os.ReadFile(path)
		if err == nil && len(strings.Fields(string(data))) >= n {
			return
		}
	}
	t.Error("not all batches were stored in time")
}
