package bus

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/kvmeter/kvmeter/sample"
)

func TestKeyringFollowsItsFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys.d")
	first, second := "0123456789abcdef", "fedcba9876543210"
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	core, logs := observer.New(zap.WarnLevel)
	k, err := NewKeyring(dir, zap.New(core))
	if err != nil || k.Len() != 0 {
		t.Fatalf("a folder that is not there: %d keys, %v", k.Len(), err)
	}
	body := []byte("body")
	// due makes the ring look now.
	due := func() { k.looked.Store(time.Now().Add(-lookEvery).UnixNano()) }
	check := func(when, secret string, want error) {
		t.Helper()
		if err := k.Verify("node-1", sample.Sign([]byte(secret), body), body); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", when, err, want)
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	write("node-1.key", first)
	k.looked.Store(time.Now().Add(time.Hour).UnixNano()) // as after a step of the clock
	check("the clock was set back", first, nil)
	write("node-1.key", first+"\n"+second+"\n")
	check("it does not look at each batch", second, sample.ErrBadSignature)
	due()
	check("a second secret", second, nil)
	check("the first still holds", first, nil)
	if got := string(k.Secret("node-1")); got != first {
		t.Errorf("signs with %q, want the first", got)
	}
	write("node-1.key", "short")
	due()
	check("a file that is no key changes nothing", second, nil)
	if n := logs.FilterMessage("keys can't be read again; those read before hold").Len(); n != 1 {
		t.Errorf("said %d times that the keys can't be read", n)
	}
	write("node-1.key", second+"\n")
	due()
	check("the first is withdrawn", first, sample.ErrBadSignature)
	if err := os.Remove(filepath.Join(dir, "node-1.key")); err != nil {
		t.Fatal(err)
	}
	due()
	check("the node is withdrawn", second, sample.ErrUnknownKey)
}

func TestASenderFollowsTheFileOfItsKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node-1.key")
	first, second := "0123456789abcdef", "fedcba9876543210"
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := NewKeyFile("node-1", path, zap.NewNop()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	write(first)
	k, err := NewKeyFile("node-1", path, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ text, want string }{
		{second + "\n" + first + "\n", second},
		{"short", second}, // it is being written
		{first + "\n", first},
	} {
		write(step.text)
		k.looked.Store(time.Now().Add(-lookEvery).UnixNano())
		if got := string(k.Secret("node-1")); got != step.want {
			t.Errorf("with %q it signs with %q, want %q", step.text, got, step.want)
		}
	}
	if got := k.Secret("node-2"); len(got) > 0 {
		t.Errorf("it signs for another node, with %q", got)
	}
}
