package jsonpath

import "strings"

// Quirks returns what may surprise about a path that can be read.
func Quirks(path string) []string {
	tokens, err := lex(path)
	if err != nil {
		return nil
	}
	var quirks []string
	var dots, operators, depth int
	union, order := false, false
	for i := range tokens {
		t := &tokens[i]
		if t.kind != symbol {
			continue
		}
		switch t.text {
		case "(", "[":
			depth++
		case ")", "]":
			depth--
		}
		if depth > 0 {
			continue
		}
		switch t.text {
		case ".":
			dots++
		case "|":
			union = true
		case "+", "-", "*":
			// A * that stands for all fields follows a dot, or begins the path.
			if before := i > 0 && !(tokens[i-1].kind == symbol && strings.Contains(".([", tokens[i-1].text)); before {
				operators++
				order = order || t.text != "+"
			}
		}
	}
	if union && dots > 0 {
		quirks = append(quirks, "| binds more tightly than a dot, so a.b|c.d is a.(b|c).d; put each path in parentheses: (a.b)|(c.d)")
	}
	if operators > 1 && order {
		quirks = append(quirks, "arithmetic takes all that follows, so x - y - z is x - (y - z) and x * 2 + y is x * (2 + y); put what belongs together in parentheses")
	}
	return quirks
}
