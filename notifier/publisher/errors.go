package publisher

import (
	"errors"
	"fmt"
	"net"
	"net/url"
)

// All is the index in a [Refusal] of everything that was given at once.
const All = -1

// Refuse returns the error for what happened to a part, or to [All]: a refusal
// where the receiver would say the same again.
func Refuse(part int, err error) error {
	var status *StatusError
	if errors.As(err, &status) && status.Permanent() {
		return &Refusal{Part: part, Err: err}
	}
	return err
}

// Lost is the error of a publisher that is best effort: so many samples or
// events are lost, and the others were sent.
type Lost struct {
	N   int
	Err error // of the last
}

func (l *Lost) Error() string { return fmt.Sprintf("%d could not be sent, the last: %v", l.N, l.Err) }

// Unwrap returns what happened to the last.
func (l *Lost) Unwrap() error { return l.Err }

// Add counts one.
func (l *Lost) Add(err error) { l.N, l.Err = l.N+1, err }

// Result returns nil where none is lost.
func (l *Lost) Result() error {
	if l.N == 0 {
		return nil
	}
	return l
}

// HostPort returns the address that a URL names.
func HostPort(u *url.URL, port string) (string, error) {
	if u.Hostname() == "" {
		return "", fmt.Errorf("it needs a host, as in %s://host:%s", u.Scheme, port)
	}
	if p := u.Port(); p != "" {
		port = p
	}
	return net.JoinHostPort(u.Hostname(), port), nil
}
