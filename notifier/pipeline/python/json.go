package python

import "encoding/json"

func skipBlank(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t' || b[0] == '\n' || b[0] == '\r') {
		b = b[1:]
	}
	return b
}

// Field returns the value of a key of a JSON object, the last where there are
// several, or nil. It reads no more of the JSON than it must.
func Field(object []byte, key string) []byte {
	var found []byte
	walk(object, '{', '}', func(k, v []byte) {
		if keyIs(k, key) {
			found = v
		}
	})
	return found
}

// elements returns the elements of a JSON list.
func elements(raw []byte) [][]byte {
	var all [][]byte
	walk(raw, '[', ']', func(_, v []byte) { all = append(all, v) })
	return all
}

// keyIs reports whether a quoted JSON string is s.
func keyIs(quoted []byte, s string) bool {
	inner := quoted[1 : len(quoted)-1]
	for _, c := range inner {
		if c == '\\' {
			var text string
			return json.Unmarshal(quoted, &text) == nil && text == s
		}
	}
	return string(inner) == s
}

// walk calls each with the members of an object or a list, until its end or
// what is no JSON.
func walk(b []byte, begin, end byte, each func(key, value []byte)) {
	b = skipBlank(b)
	if len(b) == 0 || b[0] != begin {
		return
	}
	b = skipBlank(b[1:])
	for len(b) > 0 && b[0] != end {
		var key []byte
		if begin == '{' {
			n := stringEnd(b)
			if n == 0 {
				return
			}
			key = b[:n]
			b = skipBlank(b[n:])
			if len(b) == 0 || b[0] != ':' {
				return
			}
			b = skipBlank(b[1:])
		}
		n := valueEnd(b)
		if n == 0 {
			return
		}
		each(key, b[:n])
		b = skipBlank(b[n:])
		if len(b) == 0 || b[0] != ',' {
			return
		}
		b = skipBlank(b[1:])
	}
}

// stringEnd returns the length of the string that b begins with, or 0.
func stringEnd(b []byte) int {
	if len(b) == 0 || b[0] != '"' {
		return 0
	}
	for i := 1; i < len(b); i++ {
		switch b[i] {
		case '"':
			return i + 1
		case '\\':
			i++
		}
	}
	return 0
}

// valueEnd returns the length of the value that b begins with, or 0.
func valueEnd(b []byte) int {
	if len(b) == 0 {
		return 0
	}
	switch b[0] {
	case '"':
		return stringEnd(b)
	case '{', '[':
		depth := 0
		for i := 0; i < len(b); i++ {
			switch b[i] {
			case '"':
				n := stringEnd(b[i:])
				if n == 0 {
					return 0
				}
				i += n - 1
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1
				}
			}
		}
		return 0
	}
	for i, c := range b {
		switch c {
		case ',', '}', ']', ' ', '\t', '\n', '\r', ':', '"':
			return i
		}
	}
	return len(b)
}
