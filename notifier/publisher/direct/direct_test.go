package direct

import (
	"fmt"
	"net/url"
	"testing"
)

func TestADispatcherIsAPublisher(t *testing.T) {
	for text, want := range map[string]string{
		"direct://":                     "store:",
		"database://":                   "store:",
		"direct://?dispatcher=database": "store:",
		"direct://?dispatcher=gnocchi&archive_policy=low":                                "gnocchi:?archive_policy=low",
		"direct://?dispatcher=file&file_path=/tmp/x&max_bytes=5":                         "file:///tmp/x?max_bytes=5",
		"direct://?dispatcher=http&target=https%3A%2F%2Fu%3Ap%40h%2Fx%3Fa%3D1&timeout=3": "https://u:p@h/x?a=1&timeout=3",
		"direct://?dispatcher=http":                                                      "dispatcher=http needs target, as [dispatcher_http] target was",
		"direct://?dispatcher=file":                                                      "dispatcher=file needs file_path, as [dispatcher_file] file_path was",
		"direct://?dispatcher=hbase":                                                     `option dispatcher: "hbase" is none of database, file, gnocchi, http`,
	} {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		to, err := URL(u)
		got := fmt.Sprint(err)
		if err == nil {
			got = to.String()
		}
		if got != want {
			t.Errorf("%s: got %s, want %s", text, got, want)
		}
	}
}
