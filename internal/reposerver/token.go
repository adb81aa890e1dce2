package reposerver

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/fault"
)

const tokenPrefix = "token/"

// AllRepositories is the name that stands for all of them in a Grant.
const AllRepositories = "*"

// A Grant is what the server keeps of a token: who, what, where, and not the
// secret.
type Grant struct {
	Name         string    `json:"name"`
	Role         Role      `json:"role"`
	Repositories []string  `json:"repositories"`
	SHA256       string    `json:"sha256"` // of the secret
	Made         time.Time `json:"made"`   // for people
}

// covers says whether the token is one for the repository.
func (g Grant) covers(repo string) bool {
	return slices.Contains(g.Repositories, AllRepositories) || slices.Contains(g.Repositories, repo)
}

// Tokens are the tokens of the server in one directory. They may be changed
// while the server runs, also by another process; the next request sees it.
type Tokens struct {
	state *file.Store
	pin   remote.Pin
}

// OpenTokens opens the tokens of the server in dir. Where no server has been, it
// makes the server's key if create is set, and gives fault.ErrNotFound if not.
// The caller closes them.
func OpenTokens(ctx context.Context, dir string, create bool) (*Tokens, error) {
	if !create {
		if _, err := os.Stat(filepath.Join(dir, StateDir)); errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("server in %s: %w", dir, fault.ErrNotFound)
		}
	}
	state, err := openState(dir)
	if err != nil {
		return nil, err
	}
	cert, err := certificate(ctx, state)
	if err != nil {
		state.Close()
		return nil, err
	}
	return &Tokens{state, remote.PinOf(cert.Leaf)}, nil
}

// Close lets go of the files.
func (ts *Tokens) Close() error { return ts.state.Close() }

// Pin is the server's.
func (ts *Tokens) Pin() remote.Pin { return ts.pin }

// Add makes a token. It gives fault.ErrExists if there is one of that name.
func (ts *Tokens) Add(ctx context.Context, name string, role Role, repos []string) (remote.Token, error) {
	t, err := remote.NewToken(name, ts.pin)
	if err != nil {
		return t, err
	}
	if len(repos) == 0 {
		return t, errors.New("a token without a repository opens nothing")
	}
	for _, r := range repos {
		if r == AllRepositories {
			continue
		}
		if err := remote.CheckRepo(r); err != nil {
			return t, err
		}
	}
	sum := sha256.Sum256(t.Secret.Reveal())
	b, err := json.Marshal(Grant{name, role, repos, hex.EncodeToString(sum[:]), time.Now().UTC().Truncate(time.Second)})
	if err != nil {
		return t, err
	}
	if err := ts.state.Create(ctx, tokenPrefix+name, strings.NewReader(string(b)), int64(len(b))); err != nil {
		if errors.Is(err, fault.ErrExists) {
			return t, fmt.Errorf("token %s: %w", name, fault.ErrExists)
		}
		return t, err
	}
	return t, nil
}

// Remove ends a token: the next request that shows it is refused. It gives
// fault.ErrNotFound if there is none of that name.
func (ts *Tokens) Remove(ctx context.Context, name string) error {
	if err := remote.CheckTokenName(name); err != nil {
		return err
	}
	if _, err := ts.state.Size(ctx, tokenPrefix+name); err != nil {
		if errors.Is(err, fault.ErrNotFound) {
			return fmt.Errorf("token %s: %w", name, fault.ErrNotFound)
		}
		return err
	}
	return ts.state.Delete(ctx, tokenPrefix+name)
}

// List gives all tokens, by name.
func (ts *Tokens) List(ctx context.Context) ([]Grant, error) {
	var list []Grant
	for o, err := range ts.state.List(ctx, tokenPrefix) {
		if err != nil {
			return nil, err
		}
		g, err := ts.grant(ctx, strings.TrimPrefix(o.Name, tokenPrefix))
		if errors.Is(err, fault.ErrNotFound) {
			continue // removed since
		}
		if err != nil {
			return nil, err
		}
		list = append(list, g)
	}
	return list, nil
}

func (ts *Tokens) grant(ctx context.Context, name string) (Grant, error) {
	b, err := readSmall(ctx, ts.state, tokenPrefix+name)
	if err != nil {
		return Grant{}, err
	}
	var g Grant
	if err := json.Unmarshal(b, &g); err != nil || g.Name != name {
		return Grant{}, fault.Corrupt("token "+name, -1, "it cannot be read: %v", err)
	}
	if _, err := ParseRole(string(g.Role)); err != nil {
		return Grant{}, fault.Corrupt("token "+name, -1, "%w", err)
	}
	return g, nil
}

// errNoToken is all that somebody without a good token is told.
var errNoToken = errors.New("no token, or none that this server knows")

// check gives the grant of what a client showed. It takes as long for a name
// that does not exist as for a wrong secret, as far as that is in our hands.
func (ts *Tokens) check(ctx context.Context, bearer string) (Grant, error) {
	t, err := remote.ParseBearer(bearer)
	if err != nil {
		return Grant{}, errNoToken
	}
	defer t.Secret.Wipe()
	g, err := ts.grant(ctx, t.Name)
	if err != nil && !errors.Is(err, fault.ErrNotFound) {
		return Grant{}, err
	}
	want, hexErr := hex.DecodeString(g.SHA256)
	known := err == nil && hexErr == nil && len(want) == sha256.Size
	if !known {
		want = make([]byte, sha256.Size)
	}
	got := sha256.Sum256(t.Secret.Reveal())
	if subtle.ConstantTimeCompare(got[:], want) != 1 || !known {
		return Grant{}, errNoToken
	}
	return g, nil
}
