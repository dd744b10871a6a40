package publisher

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// Web posts to a server, with the options that all publishers over HTTP share.
type Web struct {
	// URL is where to, without the options and the password.
	URL     *url.URL
	user    *url.Userinfo
	client  *http.Client
	retries int
}

// NewWeb returns a poster for a publisher's URL with the given scheme. It
// takes from the options timeout (5 s), max_retries (2; of connections, not of
// refused requests), verify_ssl (true, false or a file of certificates), clientcert
// and clientkey. Options that nobody takes stay in the URL's query.
func NewWeb(u *url.URL, scheme string, o *Options) (*Web, error) {
	if u.Host == "" {
		return nil, fmt.Errorf("it needs a host, as in %s://host:port/path", u.Scheme)
	}
	w := &Web{user: u.User, retries: o.Int("max_retries", 2)}
	timeout := o.Seconds("timeout", 5*time.Second)
	verify, cert, key := o.Text("verify_ssl", "true"), o.Text("clientcert", ""), o.Text("clientkey", "")
	if o.err != nil {
		return nil, o.err
	}
	config, err := tlsConfig(verify, cert, key)
	if err != nil {
		return nil, err
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = config
	transport.MaxIdleConnsPerHost = 4
	w.client = &http.Client{Timeout: timeout, Transport: transport}
	w.URL = &url.URL{Scheme: scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath, RawQuery: o.query(u)}
	o.values = nil
	return w, nil
}

func tlsConfig(verify, cert, key string) (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if on, ok := ParseBool(verify); ok {
		t.InsecureSkipVerify = !on // the operator's own choice
	} else {
		pem, err := os.ReadFile(verify)
		if err != nil {
			return nil, fmt.Errorf("option verify_ssl is neither true nor false, so it names a file: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("option verify_ssl: %s holds no certificate in PEM form", verify)
		}
	}
	if cert == "" && key == "" {
		return t, nil
	}
	if key == "" {
		key = cert // one file may hold both
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("options clientcert and clientkey: %w", err)
	}
	t.Certificates = []tls.Certificate{pair}
	return t, nil
}

// StatusError is a server's answer that is none of success.
type StatusError struct {
	Status int
	Text   string // begin of the answer
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("the server answers %d %s: %s", e.Status, http.StatusText(e.Status), e.Text)
}

// Permanent reports whether the same request would be refused again: the
// server understood it, and finds its content wrong.
func (e *StatusError) Permanent() bool {
	switch e.Status {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity:
		return true
	}
	return false
}

// Post sends a body to the URL, with more path behind its own, and returns the
// answer. An answer of 400 and above is a [StatusError]. A connection that fails is
// tried again.
func (w *Web) Post(ctx context.Context, path string, header http.Header, body []byte) ([]byte, error) {
	return w.Do(ctx, http.MethodPost, path, header, body)
}

// Do is [Web.Post] with another method. The path may have a query of its own.
func (w *Web) Do(ctx context.Context, method, path string, header http.Header, body []byte) ([]byte, error) {
	target := *w.URL
	path, query, ok := strings.Cut(path, "?")
	if ok {
		target.RawQuery = query
	}
	if path != "" {
		raw := strings.TrimSuffix(target.EscapedPath(), "/") + path
		unescaped, err := url.PathUnescape(raw)
		if err != nil {
			return nil, err
		}
		target.Path, target.RawPath = unescaped, raw
	}
	var errs error
	for try := 0; try <= w.retries; try++ {
		answer, err := w.once(ctx, method, target.String(), header, body)
		var status *StatusError
		if err == nil || errors.As(err, &status) || ctx.Err() != nil {
			return answer, err
		}
		errs = err
	}
	return nil, errs
}

func (w *Web) once(ctx context.Context, method, target string, header http.Header, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	for name, values := range header {
		req.Header[name] = values
	}
	if w.user != nil {
		password, _ := w.user.Password()
		req.SetBasicAuth(w.user.Username(), password)
	}
	resp, err := w.client.Do(req)
	if err != nil {
		return nil, err // names the URL, which has no password
	}
	defer func() { _ = resp.Body.Close() }()
	const most = 1 << 20
	answer, err := io.ReadAll(io.LimitReader(resp.Body, most))
	if resp.StatusCode >= 400 {
		return answer, &StatusError{resp.StatusCode, strings.TrimSpace(string(answer[:min(len(answer), 200)]))}
	}
	return answer, err
}

// Close closes idle connections.
func (w *Web) Close() { w.client.CloseIdleConnections() }

// MetricName returns a meter's name as Prometheus takes it.
func MetricName(s string) string {
	return strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == ':' {
			return c
		}
		return '_'
	}, s)
}
