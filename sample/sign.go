package sample

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// What [Keys.Verify] refuses.
var (
	ErrUnsigned     = errors.New("batch is not signed")
	ErrUnknownKey   = errors.New("batch is signed with an unknown key")
	ErrBadSignature = errors.New("signature does not match")
)

// Keys are the secrets of the senders, by key id, a line each. The key id is the
// name of the node that signs with it: with the first of its secrets, while a
// signature by any of them holds, so that a secret can be changed.
type Keys map[string][]byte

// minSecret is the least length of a secret in bytes.
const minSecret = 16

// LoadKeys reads a folder such as /etc/kvmeter/keys.d: one file a key, named
// <key id>.key, with a secret a line. A folder that does not exist holds no keys.
func LoadKeys(dir string) (Keys, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return Keys{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read keys: %w", err)
	}
	keys := Keys{}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".key")
		if !ok || e.IsDir() {
			continue
		}
		if keys[id], err = readKey(filepath.Join(dir, e.Name())); err != nil {
			return nil, fmt.Errorf("key %s: %w", id, err)
		}
	}
	return keys, nil
}

// LoadKey reads the file of one key, the id of which is given.
func LoadKey(id, path string) (Keys, error) {
	secrets, err := readKey(path)
	if err != nil {
		return nil, err
	}
	return Keys{id: secrets}, nil
}

// readKey returns the secrets of a file, a line each.
func readKey(path string) ([]byte, error) {
	data, err := ReadSecret(path, minSecret)
	if err != nil {
		return nil, err
	}
	var lines [][]byte
	for line := range bytes.SplitSeq(data, []byte("\n")) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			continue
		}
		if len(line) < minSecret {
			return nil, tooShort(path, len(line), minSecret)
		}
		lines = append(lines, line)
	}
	return bytes.Join(lines, []byte("\n")), nil
}

// Secret returns the secret that signs for a node, or nil where there is none.
func (k Keys) Secret(id string) []byte {
	first, _, _ := bytes.Cut(k[id], []byte("\n"))
	return first
}

// Sign returns the hexadecimal HMAC-SHA-256 of body.
func Sign(secret, body []byte) string {
	mac := hmac.New(sha256.New, secret)
	mac.Write(body)
	return hex.EncodeToString(mac.Sum(nil))
}

// Verify checks that signature is that of body by the key with the given id.
// It returns [ErrUnsigned], [ErrUnknownKey] or [ErrBadSignature].
func (k Keys) Verify(id, signature string, body []byte) error {
	if signature == "" {
		return ErrUnsigned
	}
	secrets := k[id]
	if len(secrets) == 0 {
		return fmt.Errorf("%w %q", ErrUnknownKey, id)
	}
	got, err := hex.DecodeString(signature)
	if err != nil {
		return ErrBadSignature
	}
	for secret := range bytes.SplitSeq(secrets, []byte("\n")) {
		mac := hmac.New(sha256.New, secret)
		mac.Write(body)
		if hmac.Equal(got, mac.Sum(nil)) {
			return nil
		}
	}
	return ErrBadSignature
}
