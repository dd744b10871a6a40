package oslo

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	amqp "github.com/rabbitmq/amqp091-go"
)

func TestTransportURL(t *testing.T) {
	for text, want := range map[string]string{
		"rabbit://openstack:secret@rabbit-1:5672/":            "amqp://openstack:secret@rabbit-1:5672/",
		"rabbit://openstack:secret@rabbit-1:5672//":           "amqp://openstack:secret@rabbit-1:5672/%2F",
		"rabbit://a:b@h1:5672,c:d@h2:5673/nova?rpc=1":         "amqp://a:b@h1:5672/nova amqp://c:d@h2:5673/nova",
		"rabbit://a:s%40%2Fx@h1/v%2Fw":                        "amqp://a:s%40%2Fx@h1:5672/v%2Fw",
		"rabbit://a:s^x|@h1":                                  "amqp://a:s%5Ex%7C@h1:5672/",
		"rabbit://a:b@h1,a:b@[fd00::1],a:b@[::1]:5671/?ssl=1": "amqps://a:b@h1:5672/ amqps://a:b@[fd00::1]:5672/ amqps://a:b@[::1]:5671/",
		"rabbit://":           "amqp://localhost:5672/",
		"http://h/":           `the driver "http" is not supported; rabbit is`,
		"rabbit:h":            "it is not of the form rabbit://user:password@host:5672/vhost",
		"rabbit://a:100%@h/":  "user or password have a % that begins no %XX",
		"rabbit://a:b@h/100%": "the virtual host has a % that begins no %XX",
		"rabbit://a:b@h/?%":   "what stands behind the ? is no list of option=value",
	} {
		urls, err := TransportURL(text, false)
		got := strings.Join(urls, " ")
		if err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%s\ngot  %s\nwant %s", text, got, want)
		}
		for _, u := range urls {
			if _, err := amqp.ParseURI(u); err != nil {
				t.Errorf("%s gives %s: %v", text, u, err)
			}
		}
	}
}

func TestTransport(t *testing.T) {
	for name, tc := range map[string]struct {
		file string
		want Transport
		err  string
	}{
		"none is named": {file: "[DEFAULT]\ntransport_url =\n"},
		"that of notifications goes before the general one": {
			"[DEFAULT]\ntransport_url = rabbit://a\n[oslo_messaging_notifications]\ntransport_url = rabbit://b\n",
			Transport{URLs: []string{"amqp://b:5672/"}, From: Value{"oslo_messaging_notifications.transport_url", "rabbit://b", "FILE", 4}},
			"",
		},
		"TLS has files": {
			"[DEFAULT]\ntransport_url = rabbit://a\n[oslo_messaging_rabbit]\nssl = yes\nssl_ca_file = /ca\nkombu_ssl_certfile = /cert\n",
			Transport{
				URLs: []string{"amqps://a:5672/"}, From: Value{"DEFAULT.transport_url", "rabbit://a", "FILE", 2},
				CA: Value{"oslo_messaging_rabbit.ssl_ca_file", "/ca", "FILE", 5}, Cert: Value{"oslo_messaging_rabbit.kombu_ssl_certfile", "/cert", "FILE", 6},
			},
			"",
		},
		"without it they are not looked at": {
			"[DEFAULT]\ntransport_url = rabbit://a\n[oslo_messaging_rabbit]\nssl_ca_file = /ca\n",
			Transport{URLs: []string{"amqp://a:5672/"}, From: Value{"DEFAULT.transport_url", "rabbit://a", "FILE", 2}},
			"",
		},
		"a mistake names its place, not the password": {
			file: "[DEFAULT]\ntransport_url = kafka://a:secret@b\n", err: `FILE:2 DEFAULT.transport_url: the driver "kafka" is not supported; rabbit is`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			file := write(t, tc.file)
			got, ok, err := read(t, file).Transport()
			if tc.err != "" {
				if want := strings.ReplaceAll(tc.err, "FILE", file); err == nil || err.Error() != want {
					t.Errorf("got error %v, want %s", err, want)
				}
				return
			}
			if err != nil || ok != (tc.want.URLs != nil) {
				t.Fatalf("got %v, %v", ok, err)
			}
			for _, v := range []*Value{&got.From, &got.CA, &got.Cert, &got.Key} {
				v.File = strings.ReplaceAll(v.File, file, "FILE")
			}
			if !ok {
				got = Transport{}
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}
