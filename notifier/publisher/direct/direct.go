// Package direct stands for the dispatchers that Ceilometer's collector had:
// each of them is a publisher here.
//
//	direct://?dispatcher=database       store://
//	direct://?dispatcher=gnocchi&…      gnocchi://?…
//	direct://?dispatcher=http&target=URL[&…]
//	direct://?dispatcher=file&file_path=/path[&max_bytes=N&backup_count=M]
//	database://                         store://
//	panko://                            store://
package direct

import (
	"errors"
	"fmt"
	"net/url"
)

// StoreURL returns that of the store, which has what Panko had, too.
func StoreURL(*url.URL) (*url.URL, error) { return &url.URL{Scheme: "store"}, nil }

// URL returns that of the publisher that a dispatcher has become.
func URL(u *url.URL) (*url.URL, error) {
	query := u.Query()
	dispatcher := ""
	if all := query["dispatcher"]; len(all) > 0 {
		dispatcher = all[len(all)-1]
	}
	query.Del("dispatcher")
	target := &url.URL{}
	switch dispatcher {
	case "", "database":
		target.Scheme = "store"
	case "gnocchi":
		target.Scheme, target.RawQuery = "gnocchi", query.Encode()
	case "file":
		path := query.Get("file_path")
		if path == "" {
			return nil, errors.New("dispatcher=file needs file_path, as [dispatcher_file] file_path was")
		}
		query.Del("file_path")
		target.Scheme, target.Path, target.RawQuery = "file", path, query.Encode()
	case "http":
		if query.Get("target") == "" {
			return nil, errors.New("dispatcher=http needs target, as [dispatcher_http] target was")
		}
		to, err := url.Parse(query.Get("target"))
		if err != nil {
			return nil, errors.New("target is no URL")
		}
		query.Del("target")
		own := to.Query()
		for name, values := range query {
			own[name] = values
		}
		to.RawQuery = own.Encode()
		target = to
	default:
		return nil, fmt.Errorf("option dispatcher: %q is none of database, file, gnocchi, http", dispatcher)
	}
	return target, nil
}
