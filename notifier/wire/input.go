package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// ReadBatches calls each with the objects that a stream of JSON holds, batch
// by batch: a list is a batch, and so is an object by itself. A list of lists is
// a list of batches. Of what convert prints, an object with a list "samples", that
// list is the batch, or with events the event beside it.
func ReadBatches(r io.Reader, events bool, each func(batch []json.RawMessage) error) error {
	dec := json.NewDecoder(r)
	for n := 1; ; n++ {
		var raw json.RawMessage
		switch err := dec.Decode(&raw); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("value %d of the input, before byte %d: %w", n, dec.InputOffset(), err)
		}
		if err := readValue(raw, events, each); err != nil {
			return fmt.Errorf("value %d of the input: %w", n, err)
		}
	}
}

func readValue(raw json.RawMessage, events bool, each func([]json.RawMessage) error) error {
	switch first(raw) {
	case '{':
		var converted struct {
			Samples []json.RawMessage
			Event   *json.RawMessage
		}
		if err := json.Unmarshal(raw, &converted); err == nil && converted.Samples != nil {
			switch {
			case !events:
				return each(converted.Samples)
			case converted.Event == nil:
				return nil
			}
			return each([]json.RawMessage{*converted.Event})
		}
		return each([]json.RawMessage{raw})
	case '[':
		var list []json.RawMessage
		if err := json.Unmarshal(raw, &list); err != nil {
			return err
		}
		if len(list) == 0 || first(list[0]) != '[' {
			return each(list)
		}
		for _, inner := range list {
			var batch []json.RawMessage
			if err := json.Unmarshal(inner, &batch); err != nil {
				return fmt.Errorf("a list of batches: %w", err)
			}
			if err := each(batch); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("%.40s is neither an object nor a list", raw)
}

func first(raw []byte) byte {
	if raw = bytes.TrimSpace(raw); len(raw) > 0 {
		return raw[0]
	}
	return 0
}
