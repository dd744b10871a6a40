package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPublishCommand(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out")
	in := someSamples + `{"message_id": "m", "event_type": "e", "generated": "2026-01-01T00:00:00", "traits": [["t", 2, 5]], "raw": {"a": 1}} {"name": "bad", "user_id": 5}`
	_, _, err := try(t, in, "publish", "--config", "/dev/null", "file://"+path+"?json")
	if want := "sample \"bad\" of \"r\": the volume is no number: \"many\"\na sample whose user_id is of type number"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	if len(lines) != 4 || lines[1] != memoryLine+"}" || lines[3] != `{"message_id": "m", "event_type": "e", "generated": "2026-01-01T00:00:00", "traits": [{"name": "t", "dtype": 2, "value": 5}], "raw": {"a": 1}}` {
		t.Errorf("got %s", data)
	}
}

func TestPublishCommandSaysWhatIsWrong(t *testing.T) {
	for name, tc := range map[string]struct{ in, url, want string }{
		"no such scheme":             {"", "monasca://", "there is none of this scheme; there are database://, "},
		"no URL":                     {"", "http://u:p%zz@h/", "a publisher is no URL of the form"},
		"a sample without a number":  {`{"name": "m", "timestamp": "2026-01-01T00:00:00"}`, "test://", "the volume is no number"},
		"events where it takes none": {`{"message_id": "m", "event_type": "e"}`, "udp://127.0.0.1", "this publisher takes samples only"},
		"a receiver that is away":    {`{"name": "m", "volume": 1, "timestamp": "2026-01-01T00:00:00"}`, "http://127.0.0.1:1/?max_retries=0", "connection refused"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := try(t, tc.in, "publish", "--config", "/dev/null", tc.url); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}
