package sample

import (
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

// Keys are the secrets of the senders, by key id. The key id is the name of
// the node that signs with it.
type Keys map[string][]byte

// LoadKeys reads a folder such as /etc/kvmeter/keys.d: one file a key, named
// <key id>.key, whose content without surrounding blanks is the secret. A
// folder that does not exist holds no keys.
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
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("read key %s: %w", id, err)
		}
		secret := strings.TrimSpace(string(data))
		if len(secret) < 16 {
			return nil, fmt.Errorf("key %s: secret of %d bytes is too short; use at least 16, for example from `openssl rand -hex 32`", id, len(secret))
		}
		keys[id] = []byte(secret)
	}
	return keys, nil
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
	secret, ok := k[id]
	if !ok {
		return fmt.Errorf("%w %q", ErrUnknownKey, id)
	}
	got, err := hex.DecodeString(signature)
	if err != nil {
		return ErrBadSignature
	}
	mac := hmac.New(sha256.New, secret)
	mac.Write(body)
	if !hmac.Equal(got, mac.Sum(nil)) {
		return ErrBadSignature
	}
	return nil
}
