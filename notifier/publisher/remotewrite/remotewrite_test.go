package remotewrite

import (
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/s2"
	"go.uber.org/zap"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/kvmeter/kvmeter/notifier/publisher"
	"github.com/kvmeter/kvmeter/sample"
)

// fields returns the fields of a message as "number: value".
func fields(t *testing.T, b []byte, inner func(n protowire.Number, value []byte) string) (all []string) {
	t.Helper()
	for len(b) > 0 {
		n, kind, size := protowire.ConsumeTag(b)
		if size < 0 {
			t.Fatal(protowire.ParseError(size))
		}
		b = b[size:]
		switch kind {
		case protowire.BytesType:
			v, size := protowire.ConsumeBytes(b)
			all, b = append(all, inner(n, v)), b[size:]
		case protowire.Fixed64Type:
			v, size := protowire.ConsumeFixed64(b)
			all, b = append(all, fmt.Sprint(math.Float64frombits(v))), b[size:]
		case protowire.VarintType:
			v, size := protowire.ConsumeVarint(b)
			all, b = append(all, fmt.Sprint(v)), b[size:]
		}
	}
	return all
}

func TestRequest(t *testing.T) {
	var got []string
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || r.URL.Path != "/w" || r.Header.Get("Content-Encoding") != "snappy" || r.Header.Get("X-Prometheus-Remote-Write-Version") != "0.1.0" {
			t.Errorf("%v %v, %v", r.URL, r.Header, err)
		}
		plain, err := s2.Decode(nil, body)
		if err != nil {
			t.Fatal(err)
		}
		text := func(_ protowire.Number, v []byte) string { return string(v) }
		member := func(n protowire.Number, v []byte) string { return fmt.Sprint(n, fields(t, v, text)) }
		got = append(got, fields(t, plain, func(n protowire.Number, v []byte) string { return fmt.Sprint(n, fields(t, v, member)) })...)
	}))
	defer s.Close()
	u, err := url.Parse("remotewrite://" + s.Listener.Addr().String() + "/w")
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(u, publisher.Deps{Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	b := sample.NewBuilder()
	for _, at := range []int64{3_000_000, 1_000_000, 1_000_999} {
		b.Row(sample.Row{Resource: "r", User: "u", Offset: at})
		b.Add(sample.MeterRef{Name: "a.b"}, sample.Walk, sample.Uint(uint64(at)))
	}
	if err := p.Publish(t.Context(), []publisher.Part{{Batch: b.Build()}}); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	// Of two in one millisecond the later counts.
	want := []string{"1 [1 [__name__ a_b] 1 [resource_id r] 1 [user_id u] 2 [1.000999e+06 1000] 2 [3e+06 3000]]"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
