package cli

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/secret"
)

// openRepo opens the repository with whatever key the user gave.
func (a *app) openRepo(ctx context.Context) (*repo.Repository, error) {
	r, err := unlock(ctx, a, repo.Open)
	if err == nil {
		a.keepIndex(r)
	}
	return r, err
}

// cacheBytes is how much the cache directory may hold: the index of 270 TB.
const cacheBytes = 16 << 30

// keepIndex keeps copies of the index of a repository that is far away.
func (a *app) keepIndex(r *repo.Repository) {
	if at, err := a.storeAt(); err == nil && at.dir == "" && a.cacheDir != "" {
		r.KeepIndex(filepath.Join(a.cacheDir, "index"), cacheBytes)
	}
}

// unlock opens the store and what open makes of it with the user's key. The
// store is closed again if that fails.
func unlock[T any](ctx context.Context, a *app, open func(context.Context, blob.Store, repo.Key) (T, error)) (t T, err error) {
	st, err := a.openStore(ctx)
	if err != nil {
		return t, err
	}
	defer func() {
		if err != nil {
			st.Close()
		}
	}()
	// Ask whether there is a repository before asking for its passphrase.
	if _, err := st.Size(ctx, "repo.json"); err != nil {
		if errors.Is(err, fault.ErrNotFound) {
			return t, withHint(fmt.Errorf("repository %s: %w", st, fault.ErrNotFound), `make one with "backstay repo init"`)
		}
		return t, fmt.Errorf("repository %s: %w", st, err)
	}
	if err := a.mustHaveKind(ctx, st); err != nil {
		return t, fmt.Errorf("repository %s: %w", st, err)
	}
	key, err := a.key(&a.cred)
	if err != nil {
		return t, err
	}
	t, err = open(ctx, st, key)
	mistyped := mistypedRecovery(key.Passphrase)
	key.Passphrase.Wipe()
	if err == nil {
		return t, nil
	}
	c := &a.cred
	switch {
	case errors.Is(err, fault.ErrKey) && mistyped != nil:
		err = withHint(fmt.Errorf("wrong passphrase: %w", err), "%s", mistyped)
	case errors.Is(err, fault.ErrKey):
		err = withHint(fmt.Errorf("wrong passphrase, or no identity of this repository: %w", err),
			"check %s, %s, %s or %s; without a key nobody can read this repository", c.flag("password-file"), c.env("PASSWORD_FILE"), c.env("PASSWORD"), c.flag("identity-file"))
	case errors.Is(err, fault.ErrNotFound):
		err = withHint(err, "bring the objects keys/… back from a copy of the repository or from a recovery kit: without them nobody can read it")
	}
	return t, fmt.Errorf("repository %s: %w", st, err)
}

// mistypedRecovery says what is wrong with p if it looks like a recovery key.
func mistypedRecovery(p secret.Bytes) error {
	_, err := secret.ParseRecovery(p.Reveal())
	var re *secret.RecoveryError
	if errors.As(err, &re) && re.Group > 0 {
		return err
	}
	return nil
}

// mustHaveKind refuses to ask for a passphrase where none can fit.
func (a *app) mustHaveKind(ctx context.Context, st blob.Store) error {
	c := &a.cred
	if a.identityPath(c) != "" || a.commandLine(c) != "" {
		return nil
	}
	r, err := repo.OpenKeyless(ctx, st)
	if err != nil {
		return err
	}
	defer r.Close()
	n, err := r.KeyCounts(ctx)
	if err != nil || n.Passphrases+n.Recovery > 0 || n.Recipients+n.Commands == 0 {
		return err
	}
	var what, how []string
	if n.Recipients > 0 {
		what = append(what, "an age identity")
		how = append(how, fmt.Sprintf("name the file with the identity with %s or %s", c.flag("identity-file"), c.env("IDENTITY_FILE")))
	}
	if n.Commands > 0 {
		what = append(what, "a key command")
		how = append(how, fmt.Sprintf("name the program that keeps the key with %s or %s", c.flag("key-command"), c.env("KEY_COMMAND")))
	}
	return withHint(fmt.Errorf("no passphrase opens it, only %s does: %w", strings.Join(what, " or "), fault.ErrKey), "%s", strings.Join(how, ", or "))
}
