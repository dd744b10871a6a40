package bus

import (
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

func TestConfigPrintsNoPassword(t *testing.T) {
	for url, want := range map[string]string{
		"amqp://kvmeter:s3cret@rabbit:5672/v": "amqp://kvmeter:xxxxx@rabbit:5672/v",
		"amqp://rabbit:5672/":                 "amqp://rabbit:5672/",
		"amqp://u:s3cret%zz@rabbit/":          "not a URL",
	} {
		out, err := yaml.Marshal(Config{URL: url})
		if err != nil {
			t.Fatal(err)
		}
		if got := string(out); !strings.Contains(got, "url: "+want) || strings.Contains(got, "s3cret") {
			t.Errorf("%s is printed as\n%s", url, got)
		}
	}
}
