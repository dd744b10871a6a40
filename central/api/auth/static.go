package auth

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.yaml.in/yaml/v3"

	"github.com/kvmeter/kvmeter/central/api"
)

// minToken is the least length of a token in a file: shorter ones can be guessed.
const minToken = 16

// staticToken is an entry of the file of tokens.
type staticToken struct {
	// Exactly one of these: the token, or its SHA-256 in hex, so that the file
	// does not give it away.
	Token  string `yaml:"token"`
	SHA256 string `yaml:"sha256"`

	User    string    `yaml:"user"`
	Project string    `yaml:"project"`
	Roles   []string  `yaml:"roles"`
	Expires time.Time `yaml:"expires"` // not set: never
}

type digest = [sha256.Size]byte

type known struct {
	api.Identity
	expires time.Time
}

// static knows the tokens of a file. What is looked up is a digest, so that how
// long it takes tells nothing of a token.
type static struct {
	path string
	log  *zap.Logger

	mu      sync.Mutex
	looked  time.Time // at the file
	changed time.Time // the file's own time
	tokens  map[digest]known
}

func newStatic(path string, log *zap.Logger) (*static, error) {
	s := &static{path: path, log: log}
	tokens, err := readStatic(path)
	if err != nil {
		return nil, err
	}
	s.tokens, s.looked = tokens, time.Now()
	if info, err := os.Stat(path); err == nil {
		s.changed = info.ModTime()
	}
	return s, nil
}

// readStatic reads a file of tokens.
func readStatic(path string) (map[digest]known, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("static tokens: %w", err)
	}
	defer f.Close()
	var file struct {
		Tokens []staticToken `yaml:"tokens"`
	}
	d := yaml.NewDecoder(f)
	d.KnownFields(true)
	if err := d.Decode(&file); err != nil {
		return nil, fmt.Errorf("static tokens: %s: %w", path, err)
	}
	tokens := map[digest]known{}
	for i := range file.Tokens {
		t := &file.Tokens[i]
		key, err := t.digest()
		if err != nil {
			return nil, fmt.Errorf("static tokens: %s: entry %d: %w", path, i+1, err)
		}
		if _, twice := tokens[key]; twice {
			return nil, fmt.Errorf("static tokens: %s: entry %d: the token is there twice", path, i+1)
		}
		tokens[key] = known{api.Identity{User: t.User, Project: t.Project, Roles: roles(t.Roles)}, t.Expires}
	}
	return tokens, nil
}

func (t *staticToken) digest() (digest, error) {
	switch {
	case (t.Token == "") == (t.SHA256 == ""):
		return digest{}, errors.New("give one of token and sha256")
	case t.User == "":
		return digest{}, errors.New("user is missing")
	case t.Token != "" && len(t.Token) < minToken:
		return digest{}, fmt.Errorf("the token is shorter than %d characters; make one by openssl rand -hex 32", minToken)
	case t.Token != "":
		return sha256.Sum256([]byte(t.Token)), nil
	}
	b, err := hex.DecodeString(t.SHA256)
	if err != nil || len(b) != sha256.Size {
		return digest{}, errors.New("sha256 is not 64 hexadecimal digits, as printf %s TOKEN | sha256sum gives")
	}
	return digest(b), nil
}

func (s *static) identify(_ context.Context, token string) (api.Identity, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); now.Sub(s.looked) >= time.Second {
		s.looked = now
		s.reload()
	}
	k, ok := s.tokens[sha256.Sum256([]byte(token))]
	switch {
	case !ok:
		return api.Identity{}, errUnknown
	case !k.expires.IsZero() && !time.Now().Before(k.expires):
		return api.Identity{}, fmt.Errorf("the static token of %s has expired", k.User)
	}
	return k.Identity, nil
}

// reload reads the file again if it has changed. A mistake leaves the tokens as
// they are.
func (s *static) reload() {
	info, err := os.Stat(s.path)
	if err == nil && info.ModTime().Equal(s.changed) {
		return
	}
	tokens, err := readStatic(s.path)
	if err != nil {
		s.log.Error("static tokens stay as they were", zap.Error(err))
		return
	}
	s.tokens, s.changed = tokens, info.ModTime()
	s.log.Info("static tokens read again", zap.Int("tokens", len(tokens)))
}
