package api

import _ "embed"

// openAPI describes the API; a test holds it against the handlers.
//
//go:embed openapi.json
var openAPI []byte

func (s *server) describe(r *request, out *output) error {
	if _, err := readParams(r.Request); err != nil {
		return err
	}
	out.buf = append(out.buf, openAPI...)
	return nil
}
