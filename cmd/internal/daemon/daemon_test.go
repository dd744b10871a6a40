package daemon

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestEachHangupReloadsAndAFailureIsSaid(t *testing.T) {
	// Until somebody asks for it, the signal ends the process.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	core, logs := observer.New(zap.InfoLevel)
	ctx, cancel := context.WithCancel(t.Context())
	reloads := make(chan error)
	ended := make(chan error, 1)
	go func() { ended <- OnHangup(ctx, zap.New(core), func() error { return <-reloads }) }()
	hangUp := func(result error) {
		for {
			if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			select {
			case reloads <- result:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	hangUp(errors.New("pipeline.yaml:3: no such thing"))
	hangUp(nil)
	cancel()
	close(reloads)
	if err := <-ended; err != nil || logs.FilterMessageSnippet("not reloaded").Len() != 1 {
		t.Errorf("%v, the log has %v", err, logs.All())
	}
}
