package oslo

import (
	"cmp"
	"fmt"
	"net/url"
	"strings"
)

// Transport is a broker as oslo.messaging is told of it.
type Transport struct {
	// URLs are those of the broker's nodes, amqp:// or amqps://.
	URLs []string
	// From is the option that names it.
	From Value
	// CA, Cert and Key are files for TLS; the ones that are not set are empty.
	CA, Cert, Key Value
}

// Transport returns the broker that notifications are sent to. ok is false if the
// files name none.
func (c *Config) Transport() (t Transport, ok bool, err error) {
	t.From, ok = c.Text("oslo_messaging_notifications.transport_url", "DEFAULT.notification_transport_url", "rpc_notifier2.transport_url")
	if !ok || t.From.Text == "" {
		if t.From, ok = c.Text("DEFAULT.transport_url"); !ok || t.From.Text == "" {
			return t, false, nil
		}
	}
	ssl, _, _, err := c.Bool("oslo_messaging_rabbit.ssl", "oslo_messaging_rabbit.rabbit_use_ssl")
	if err != nil {
		return t, true, err
	}
	if t.URLs, err = TransportURL(t.From.Text, ssl); err != nil {
		return t, true, fmt.Errorf("%s: %w", t.From.String(), err)
	}
	if strings.HasPrefix(t.URLs[0], "amqps:") {
		t.CA, _ = c.Text("oslo_messaging_rabbit.ssl_ca_file", "oslo_messaging_rabbit.kombu_ssl_ca_certs")
		t.Cert, _ = c.Text("oslo_messaging_rabbit.ssl_cert_file", "oslo_messaging_rabbit.kombu_ssl_certfile")
		t.Key, _ = c.Text("oslo_messaging_rabbit.ssl_key_file", "oslo_messaging_rabbit.kombu_ssl_keyfile")
	}
	return t, true, nil
}

// TransportURL returns the nodes of rabbit://user:password@host:port,…/vhost as
// amqp:// URLs, or with TLS as amqps:// ones. The error never holds the password.
func TransportURL(text string, tls bool) ([]string, error) {
	scheme, rest, ok := strings.Cut(text, "://")
	switch {
	case !ok:
		return nil, fmt.Errorf("it is not of the form rabbit://user:password@host:5672/vhost")
	case scheme != "rabbit" && scheme != "kombu" && scheme != "amqp" && scheme != "amqps":
		return nil, fmt.Errorf("the driver %q is not supported; rabbit is", scheme)
	}
	rest, query, _ := strings.Cut(rest, "?")
	hosts, vhost, _ := strings.Cut(rest, "/")
	options, err := url.ParseQuery(query)
	if err != nil {
		return nil, fmt.Errorf("what stands behind the ? is no list of option=value")
	}
	switch strings.ToLower(options.Get("ssl")) {
	case "true", "1", "on", "yes":
		tls = true
	case "false", "0", "off", "no":
		tls = false
	}
	u := url.URL{Scheme: "amqp"}
	if tls || scheme == "amqps" {
		u.Scheme = "amqps"
	}
	if vhost, err = url.PathUnescape(vhost); err != nil {
		return nil, fmt.Errorf("the virtual host has a %% that begins no %%XX")
	}
	u.Path, u.RawPath = "/"+vhost, "/"+url.PathEscape(vhost)
	var urls []string
	for node := range strings.SplitSeq(hosts, ",") {
		u.User, u.Host = nil, node
		if at := strings.LastIndexByte(node, '@'); at >= 0 {
			user, password, _ := strings.Cut(node[:at], ":")
			name, err1 := url.PathUnescape(user)
			secret, err2 := url.PathUnescape(password)
			if err := cmp.Or(err1, err2); err != nil {
				return nil, fmt.Errorf("user or password have a %% that begins no %%XX")
			}
			u.User, u.Host = url.UserPassword(name, secret), node[at+1:]
		}
		if colon := strings.LastIndexByte(u.Host, ':'); colon < 0 || strings.HasSuffix(u.Host, "]") {
			u.Host = cmp.Or(u.Host, "localhost") + ":5672" // with TLS, too
		}
		urls = append(urls, u.String())
	}
	return urls, nil
}
