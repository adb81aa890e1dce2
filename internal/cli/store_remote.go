package cli

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/fault"
)

const tokenHint = `the server's administrator makes one with "backstay repo serve token add"`

// tokens takes the tokens for repository servers from files or the environment.
// There may be several: one command may use two repositories.
func (a *app) tokens() (list []remote.Token, err error) {
	files := a.tokenFiles
	if len(files) == 0 {
		files = filepath.SplitList(a.getenv("BACKSTAY_TOKEN_FILE"))
	}
	add := func(text, from string) error {
		t, err := remote.ParseToken(strings.TrimSpace(text))
		if err != nil {
			return withHint(fmt.Errorf("%s: %w", from, err), tokenHint)
		}
		list = append(list, t)
		return nil
	}
	for _, path := range files {
		data, err := a.readSecretFile(path, maxPassphraseBytes)
		if err != nil {
			return nil, withHint(fmt.Errorf("token file: %w", err), "check --token-file or BACKSTAY_TOKEN_FILE")
		}
		err = add(string(data), path)
		clear(data)
		if err != nil {
			return nil, err
		}
	}
	if text := a.getenv("BACKSTAY_TOKEN"); len(files) == 0 && text != "" {
		if err := add(text, "BACKSTAY_TOKEN"); err != nil {
			return nil, err
		}
	}
	if len(list) == 0 {
		return nil, withHint(fmt.Errorf("no token for the repository server: %w", fault.ErrDenied),
			"set --token-file, BACKSTAY_TOKEN_FILE or BACKSTAY_TOKEN; "+tokenHint)
	}
	return list, nil
}

// connect calls with each token until one is not refused. A token is shown to
// no server but the one that it is from, so trying costs no secret.
func (a *app) connect(l remote.Location, call func(remote.Token) (*remote.Store, error)) (*remote.Store, error) {
	list, err := a.tokens()
	if err != nil {
		return nil, err
	}
	var refused error
	for _, t := range list {
		// A fingerprint in the URL speaks for the one token that is given; of
		// several it would show the others to a server that they are not from.
		if len(list) > 1 && l.Pin != nil && *l.Pin != t.Pin {
			refused = errors.Join(refused, fmt.Errorf("%s: token %s is for the server %s: %w", l, t.Name, t.Pin, fault.ErrDenied))
			continue
		}
		st, err := call(t)
		t.Secret.Wipe()
		if err == nil {
			return st, nil
		}
		// That it is for another server says less than what this server says.
		var pin *remote.PinError
		if refused == nil || errors.As(refused, &pin) {
			refused = err
		}
		if !errors.Is(err, fault.ErrDenied) {
			refused = err
			break
		}
	}
	return nil, remoteHint(fmt.Errorf("repository %w", refused), l)
}

func (a *app) openRemote(ctx context.Context, l remote.Location) (blob.Store, error) {
	st, err := a.connect(l, func(t remote.Token) (*remote.Store, error) { return remote.Open(ctx, l, t) })
	if err != nil {
		return nil, err
	}
	return a.patient(st), nil
}

func (a *app) createRemote(ctx context.Context, l remote.Location) (blob.Store, error) {
	st, err := a.connect(l, func(t remote.Token) (*remote.Store, error) { return remote.Create(ctx, l, t) })
	if err != nil {
		return nil, err
	}
	if err := a.mustBeEmpty(ctx, st); err != nil {
		st.Close()
		return nil, err
	}
	return a.patient(st), nil
}

func remoteHint(err error, l remote.Location) error {
	var pin *remote.PinError
	switch {
	case errors.As(err, &pin):
		return withHint(err, `it is another server than the token is from, or somebody stands between; nothing was sent. If its administrator confirms the new key, say --repo "%s#%s"`, l, pin.Got)
	case errors.Is(err, fault.ErrDenied):
		return withHint(err, `the server's administrator sees what a token is for with "backstay repo serve token list"`)
	case errors.Is(err, fault.ErrNotFound):
		return withHint(err, `make one with "backstay repo init --repo %s"`, l)
	}
	return err
}
