package sample

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// CredentialsVariable is the environment variable in which systemd says where
// the credentials of a service are (LoadCredential=, systemd.exec(5)).
const CredentialsVariable = "CREDENTIALS_DIRECTORY"

// SecretPath returns the file that a setting names. One that begins with
// $CREDENTIALS_DIRECTORY/ is in systemd's folder of credentials.
func SecretPath(path string) string {
	if name, ok := strings.CutPrefix(path, "$"+CredentialsVariable+"/"); ok {
		return filepath.Join(os.Getenv(CredentialsVariable), name)
	}
	return path
}

// ReadSecret reads the file that a setting names: its content without
// surrounding blanks, at least least bytes. The error never holds any of it.
func ReadSecret(path string, least int) ([]byte, error) {
	data, err := os.ReadFile(SecretPath(path))
	if err != nil {
		return nil, fmt.Errorf("read the secret: %w", err)
	}
	secret := bytes.TrimSpace(data)
	if len(secret) < least {
		return nil, tooShort(path, len(secret), least)
	}
	return secret, nil
}

func tooShort(path string, n, least int) error {
	return fmt.Errorf("%s: secret of %d bytes is too short; use at least %d, for example from `openssl rand -hex 32`", path, n, least)
}
