package daemon

import (
	"context"
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Harden keeps what the process has in memory, secrets among it, out of core
// dumps, and its memory and environment from other processes of its user.
func Harden() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	return nil
}

// Notify tells systemd that the service is ready and feeds its watchdog until
// ctx ends, for as long as stuck returns nothing: it names what has not come round
// for some time. Where systemd has not asked for it (Type=notify, WatchdogSec=) it
// does nothing.
func Notify(ctx context.Context, log *zap.Logger, stuck func(atLeast time.Duration) string) error {
	say := func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			log.Warn("cannot tell systemd how the service is", zap.String("state", state), zap.Error(err))
		}
	}
	within, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("systemd's watchdog: %w", err)
	}
	say(daemon.SdNotifyReady)
	defer say(daemon.SdNotifyStopping)
	if within == 0 {
		<-ctx.Done()
		return nil
	}
	t := time.NewTicker(within / 4)
	defer t.Stop()
	for {
		if what := stuck(within / 2); what != "" {
			log.Error("not alive; systemd will restart the service", zap.String("stuck", what), zap.Duration("within", within))
		} else {
			say(daemon.SdNotifyWatchdog)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// NeverStuck is for services without a loop of their own: they are alive while
// they run at all.
func NeverStuck(time.Duration) string { return "" }
