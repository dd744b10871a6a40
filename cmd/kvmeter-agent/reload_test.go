package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/kvmeter/kvmeter/cmd/internal/config"
	"github.com/kvmeter/kvmeter/cmd/internal/host"
	"github.com/kvmeter/kvmeter/cmd/internal/settings/compute"
)

// TestHangup reloads an agent that runs by SIGHUP: whole, or not at all.
func TestHangup(t *testing.T) {
	mine := make(chan os.Signal, 1)
	signal.Notify(mine, syscall.SIGHUP) // so that none ends the test
	defer signal.Stop(mine)
	dir := t.TempDir()
	polling := filepath.Join(dir, "polling.yaml")
	write := func(name, text string) {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(file+".new", []byte(text), 0o600), os.Rename(file+".new", file)); err != nil {
			t.Fatal(err)
		}
	}
	base := "wire: off\nlibvirt: off\nsocket: \"\"\ncounters: \"\"\npins: \"\"\nspool: {path: \"\"}\nipmi: {device: \"\"}\nhooks: {}\nprofile: lean\n" + "polling: " + polling + "\n"
	write("agent.yaml", base)
	write("polling.yaml", "sources: [{name: a, interval: 3600, meters: [cpu]}]")
	load := func() (compute.Agent, error) {
		cfg := compute.DefaultAgent()
		_, err := config.Load(filepath.Join(dir, "agent.yaml"), nil, &cfg)
		return cfg, err
	}
	cfg, err := load()
	if err != nil {
		t.Fatal(err)
	}
	core, seen := observer.New(zapcore.InfoLevel)
	deps, done := host.Open(zap.New(core), cfg.Profile, true)
	defer func() { _ = done() }()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() {
		if err := run(ctx, cfg, deps, load); err != nil {
			t.Error(err)
		}
	})
	for deadline := time.Now().Add(30 * time.Second); seen.FilterMessage("metering").Len() == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the agent does not start: %v", seen.All())
		}
	}
	// said sends SIGHUP until the log says what is wanted.
	said := func(message, detail string) {
		t.Helper()
		deadline := time.Now().Add(30 * time.Second)
		for {
			if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Millisecond)
			for _, e := range seen.FilterMessage(message).All() {
				for key, v := range e.ContextMap() {
					if text, _ := v.(string); key == "error" && strings.Contains(text, detail) {
						return
					}
					list, _ := v.([]any)
					for _, one := range list {
						if text, _ := one.(string); strings.Contains(text, detail) {
							return
						}
					}
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("the log never says %q, %q: %v", message, detail, seen.All())
			}
		}
	}
	const reloaded, refused = "configuration reloaded", "configuration not reloaded; the one before stays in use"
	write("polling.yaml", "sources: [{name: a, interval: 1800, meters: [cpu]}]")
	said(reloaded, "cpu: polled every 30m0s, not every 1h0m0s")
	write("polling.yaml", "sources: [{name: a, meters: [cpu]}]")
	said(refused, `the source "a" has no interval`)
	write("agent.yaml", base+"node: another\n")
	write("polling.yaml", "sources: [{name: a, interval: 900, meters: [cpu]}]")
	said(refused, "node: takes a restart of the agent")
	if n := seen.FilterMessage(reloaded).FilterField(zap.Strings("polling", []string{"cpu: polled every 15m0s, not every 30m0s"})).Len(); n != 0 {
		t.Error("a part of what was refused holds")
	}
	write("agent.yaml", base+"qemu_interval: 10m\n")
	said(reloaded, "qemu_interval")
	said(reloaded, "cpu: polled every 15m0s, not every 30m0s")
}
