package cli

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

func TestDeadLetters(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	letters := []DeadLetter{
		{Name: "a", Queue: "kvmeter.samples.0", Reason: "batch is not signed", RoutingKey: "samples.0", ContentType: "application/vnd.kvmeter.batch.v1+msgpack", ContentEncoding: "zstd", Time: at, Body: []byte{1, 2}},
		{Name: "b", Queue: "kvmeter.store.0", Reason: "signature does not match", Key: "compute-1", Body: []byte("text")},
	}
	for name, tc := range map[string]struct {
		args []string
		want string // of the output
		fate string // of both
		err  string
	}{
		"list":              {args: []string{"list", "-f", "value"}, want: "a 2026-01-02T03:04:05 kvmeter.samples.0  2 batch is not signed\nb None kvmeter.store.0 compute-1 4 signature does not match\n", fate: "keep keep"},
		"list as JSON":      {args: []string{"list", "-l", "1", "-f", "json"}, want: "There are more than these 1: -l N lists N.\n" + `[{"ID":"a","Time":"2026-01-02T03:04:05","Queue":"kvmeter.samples.0","Key":"","Bytes":2,"Reason":"batch is not signed"}]`, fate: "keep keep"},
		"show":              {args: []string{"show", "a", "-f", "json"}, want: `"body":"AQI="`, fate: "keep"},
		"show text":         {args: []string{"show", "b", "-f", "json"}, want: `"body":"text"`, fate: "keep keep"},
		"show none":         {args: []string{"show", "c"}, fate: "keep keep", err: "there is no dead letter c"},
		"retry one":         {args: []string{"retry", "b"}, want: "1 retried\n", fate: "keep retry"},
		"retry all":         {args: []string{"retry", "--all"}, want: "2 retried\n", fate: "retry retry"},
		"drop":              {args: []string{"drop", "a", "b"}, want: "2 dropped\n", fate: "drop drop"},
		"drop with one bad": {args: []string{"drop", "a", "c"}, want: "1 dropped\n", fate: "drop keep", err: "there is no dead letter c"},
		"drop nothing":      {args: []string{"drop"}, err: "drop takes the ids of messages, or --all"},
		"drop too much":     {args: []string{"drop", "a", "--all"}, err: "drop takes the ids of messages, or --all"},
		"a bad format":      {args: []string{"list", "-f", "xml"}, err: "there is no output format"},
	} {
		t.Run(name, func(t *testing.T) {
			var fates []string
			o := Options{DeadLetters: func(*cobra.Command) func() (DeadLetters, func(), error) {
				return func() (DeadLetters, func(), error) {
					return func(_ context.Context, decide func(*DeadLetter) (string, bool)) error {
						for i := range letters {
							fate, more := decide(&letters[i])
							if fates = append(fates, fate); !more {
								break
							}
						}
						return nil
					}, func() {}, nil
				}
			}}
			c := deadLetters(o)
			c.SilenceErrors = true
			var out bytes.Buffer
			c.SetOut(&out)
			c.SetErr(&out)
			c.SetArgs(tc.args)
			err := c.Execute()
			if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("error %v, want %q", err, tc.err)
			}
			got := out.String()
			if strings.Contains(tc.want, "ID") {
				got = strings.Join(strings.Fields(strings.ReplaceAll(got, `": `, `":`)), "")
				tc.want = strings.Join(strings.Fields(tc.want), "")
			}
			if tc.err == "" && !strings.Contains(strings.ReplaceAll(got, `": `, `":`), tc.want) {
				t.Errorf("got\n%s\nwant\n%s", got, tc.want)
			}
			if f := strings.Join(fates, " "); f != tc.fate {
				t.Errorf("fates %q, want %q", f, tc.fate)
			}
		})
	}
}

func TestDeadLettersSayThatThereIsNoBroker(t *testing.T) {
	o := Options{DeadLetters: func(*cobra.Command) func() (DeadLetters, func(), error) {
		return func() (DeadLetters, func(), error) { return nil, nil, errors.New("no broker") }
	}}
	c := deadLetters(o)
	c.SilenceErrors = true
	c.SetArgs([]string{"list"})
	if err := c.Execute(); err == nil || err.Error() != "no broker" {
		t.Errorf("error %v", err)
	}
}
