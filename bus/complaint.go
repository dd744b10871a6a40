package bus

import (
	"sync"
	"time"

	"go.uber.org/zap"
)

// sayAgain is how long a complaint that does not change stays unsaid.
const sayAgain = 5 * time.Minute

// complaint logs a trouble once when it begins, again when its error changes or
// has lasted, and its end. One that comes and goes is not logged each time.
type complaint struct {
	log    *zap.Logger
	mu     sync.Mutex
	text   string // that was logged last
	said   time.Time
	logged bool // and its end was not
}

func newComplaint(log *zap.Logger) *complaint { return &complaint{log: log} }

func (c *complaint) say(what string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := what + ": " + err.Error()
	if text == c.text && time.Since(c.said) < sayAgain {
		return
	}
	c.text, c.said, c.logged = text, time.Now(), true
	c.log.Warn(what, zap.Error(err))
}

func (c *complaint) over(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.logged {
		c.logged = false
		c.log.Info(what)
	}
}
