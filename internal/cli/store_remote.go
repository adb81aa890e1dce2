package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/remote"
	"github.com/backstay/backstay/internal/fault"
)

// token takes the token for a repository server from a file or the environment.
func (a *app) token() (remote.Token, error) {
	text, from := a.getenv("BACKSTAY_TOKEN"), "BACKSTAY_TOKEN"
	path := a.tokenFile
	if path == "" {
		path = a.getenv("BACKSTAY_TOKEN_FILE")
	}
	const hint = `the server's administrator makes one with "backstay repo serve token add"`
	switch {
	case path != "":
		data, err := a.readSecretFile(path, maxPassphraseBytes)
		if err != nil {
			return remote.Token{}, withHint(fmt.Errorf("token file: %w", err), "check --token-file or BACKSTAY_TOKEN_FILE")
		}
		defer clear(data)
		text, from = string(data), path
	case text == "":
		return remote.Token{}, withHint(fmt.Errorf("no token for the repository server: %w", fault.ErrDenied),
			"set --token-file, BACKSTAY_TOKEN_FILE or BACKSTAY_TOKEN; "+hint)
	}
	t, err := remote.ParseToken(strings.TrimSpace(text))
	if err != nil {
		return remote.Token{}, withHint(fmt.Errorf("%s: %w", from, err), hint)
	}
	return t, nil
}

func (a *app) openRemote(ctx context.Context, l remote.Location) (blob.Store, error) {
	t, err := a.token()
	if err != nil {
		return nil, err
	}
	st, err := remote.Open(ctx, l, t)
	t.Secret.Wipe()
	if err != nil {
		return nil, remoteHint(fmt.Errorf("repository %w", err), l)
	}
	return a.patient(st), nil
}

func (a *app) createRemote(ctx context.Context, l remote.Location) (blob.Store, error) {
	t, err := a.token()
	if err != nil {
		return nil, err
	}
	st, err := remote.Create(ctx, l, t)
	t.Secret.Wipe()
	if err != nil {
		return nil, remoteHint(fmt.Errorf("repository %w", err), l)
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
