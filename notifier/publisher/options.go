package publisher

import (
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
)

// Options are the options of a publisher's URL. Of those that are repeated the
// last counts. The first thing wrong is kept for Err.
type Options struct {
	values url.Values
	err    error
}

// NewOptions returns the options of a URL.
func NewOptions(u *url.URL) *Options {
	o := &Options{}
	o.values, o.err = url.ParseQuery(u.RawQuery)
	return o
}

// Has takes an option that needs no value and reports whether it is there.
func (o *Options) Has(name string) bool {
	_, ok := o.values[name]
	delete(o.values, name)
	return ok
}

// All takes every value of an option.
func (o *Options) All(name string) []string {
	all := o.values[name]
	delete(o.values, name)
	return all
}

// Text takes an option.
func (o *Options) Text(name, unset string) string {
	all := o.All(name)
	if len(all) == 0 {
		return unset
	}
	return all[len(all)-1]
}

// One takes an option that is one of a few words, the first where it is not
// there.
func (o *Options) One(name string, words ...string) string {
	v := o.Text(name, words[0])
	if !slices.Contains(words, v) {
		o.fail(name, "%q is none of %s", v, strings.Join(words, ", "))
	}
	return v
}

// Int takes an option that is a whole number of at least 0.
func (o *Options) Int(name string, unset int) int {
	text := o.Text(name, "")
	if text == "" {
		return unset
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		o.fail(name, "%q is not a whole number of at least 0", text)
	}
	return n
}

// Seconds takes an option that is a number of seconds.
func (o *Options) Seconds(name string, unset time.Duration) time.Duration {
	text := o.Text(name, "")
	if text == "" {
		return unset
	}
	f, err := strconv.ParseFloat(text, 64)
	if err != nil || f <= 0 || f > 1e6 {
		o.fail(name, "%q is no number of seconds", text)
	}
	return time.Duration(f * float64(time.Second))
}

// Bool takes an option that is true or false, in any of Python's ways to say so.
func (o *Options) Bool(name string, unset bool) bool {
	text := o.Text(name, "")
	if text == "" {
		return unset
	}
	v, ok := ParseBool(text)
	if !ok {
		o.fail(name, "%q is neither true nor false", text)
	}
	return v
}

// ParseBool reads what oslo's strutils takes for a boolean.
func ParseBool(text string) (v, ok bool) {
	switch strings.ToLower(strings.TrimSpace(text)) {
	case "1", "t", "true", "on", "y", "yes":
		return true, true
	case "0", "f", "false", "off", "n", "no":
		return false, true
	}
	return false, false
}

func (o *Options) fail(name, format string, args ...any) {
	if o.err == nil {
		o.err = fmt.Errorf("option %s: %s", name, fmt.Sprintf(format, args...))
	}
}

// query returns what is left of the URL's query, in its order.
func (o *Options) query(u *url.URL) string {
	var rest []string
	for pair := range strings.SplitSeq(u.RawQuery, "&") {
		name, _, _ := strings.Cut(pair, "=")
		if name, err := url.QueryUnescape(name); err == nil && o.values.Has(name) {
			rest = append(rest, pair)
		}
	}
	return strings.Join(rest, "&")
}

// Done returns the first mistake. Options that are left have no effect, as in
// Ceilometer, and are warned of.
func (o *Options) Done(log *zap.Logger) error {
	for name := range o.values {
		log.Warn("an option of a publisher is unknown and has no effect", zap.String("option", name))
	}
	return o.err
}
