package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"filippo.io/age"
	"golang.org/x/term"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/secret"
)

// A passphrase longer than this is a wrong file.
const maxPassphraseBytes = 4096

// openRepo opens the repository with whatever key the user gave.
func (a *app) openRepo(ctx context.Context) (*repo.Repository, error) {
	st, err := a.openStore(ctx)
	if err != nil {
		return nil, err
	}
	// Ask whether there is a repository before asking for its passphrase.
	if _, err := st.Size(ctx, "repo.json"); err != nil {
		st.Close()
		if errors.Is(err, fault.ErrNotFound) {
			return nil, withHint(fmt.Errorf("repository %s: %w", st, fault.ErrNotFound), `make one with "backstay repo init"`)
		}
		return nil, fmt.Errorf("repository %s: %w", st, err)
	}
	if err := a.mustHaveIdentity(ctx, st); err != nil {
		st.Close()
		return nil, fmt.Errorf("repository %s: %w", st, err)
	}
	key, err := a.key()
	if err != nil {
		st.Close()
		return nil, err
	}
	r, err := repo.Open(ctx, st, key)
	key.Passphrase.Wipe()
	if err != nil {
		st.Close()
		if errors.Is(err, fault.ErrKey) {
			err = withHint(fmt.Errorf("wrong passphrase, or no identity of this repository: %w", err),
				"check --password-file, BACKSTAY_PASSWORD_FILE, BACKSTAY_PASSWORD or --identity-file; without a key nobody can read this repository")
		} else if errors.Is(err, fault.ErrNotFound) {
			err = withHint(err, "bring the objects keys/… back from a copy of the repository: without them nobody can read it")
		}
		return nil, fmt.Errorf("repository %s: %w", st, err)
	}
	return r, nil
}

// identityPath is the file with age identities that the user named.
func (a *app) identityPath() string {
	if a.identityFile != "" {
		return a.identityFile
	}
	return a.getenv("BACKSTAY_IDENTITY_FILE")
}

// mustHaveIdentity refuses to ask for a passphrase where none can fit.
func (a *app) mustHaveIdentity(ctx context.Context, st blob.Store) error {
	if a.identityPath() != "" {
		return nil
	}
	r, err := repo.OpenKeyless(ctx, st)
	if err != nil {
		return err
	}
	defer r.Close()
	passphrases, recipients, err := r.KeyCounts(ctx)
	if err != nil || passphrases > 0 || recipients == 0 {
		return err
	}
	return withHint(fmt.Errorf("no passphrase opens it, only an age identity does: %w", fault.ErrKey),
		"name the file with the identity with --identity-file or BACKSTAY_IDENTITY_FILE")
}

// key gathers what opens a repository: identities where a file names them,
// otherwise the passphrase.
func (a *app) key() (repo.Key, error) {
	var k repo.Key
	path := a.identityPath()
	if path != "" {
		data, err := a.readSecretFile(path)
		if err != nil {
			return k, withHint(fmt.Errorf("identity file: %w", err), "check --identity-file or BACKSTAY_IDENTITY_FILE")
		}
		k.Identities, err = age.ParseIdentities(bytes.NewReader(data))
		clear(data)
		if err != nil {
			// The parser's text may quote the line it did not understand.
			return k, withHint(fmt.Errorf("identity file %s: no age identities in it", path), "it must hold an identity as age-keygen writes it")
		}
	}
	if path == "" || a.hasPassphrase() {
		var err error
		if k.Passphrase, err = a.passphrase("Passphrase: "); err != nil {
			return k, err
		}
	}
	return k, nil
}

func (a *app) hasPassphrase() bool {
	return a.passwordFile != "" || a.getenv("BACKSTAY_PASSWORD_FILE") != "" || a.getenv("BACKSTAY_PASSWORD") != ""
}

// passphrase takes the passphrase from a file, the environment or a prompt.
func (a *app) passphrase(prompt string) (secret.Bytes, error) {
	path := a.passwordFile
	if path == "" {
		path = a.getenv("BACKSTAY_PASSWORD_FILE")
	}
	if path != "" {
		data, err := a.readSecretFile(path)
		if err != nil {
			return secret.Bytes{}, withHint(fmt.Errorf("password file: %w", err), "check --password-file or BACKSTAY_PASSWORD_FILE")
		}
		return onePassphrase(data, path)
	}
	if p := a.getenv("BACKSTAY_PASSWORD"); p != "" {
		return onePassphrase([]byte(p), "BACKSTAY_PASSWORD")
	}
	if a.stdin == nil || !term.IsTerminal(int(a.stdin.Fd())) {
		return secret.Bytes{}, withHint(fmt.Errorf("no passphrase given: %w", fault.ErrKey),
			"set --password-file, BACKSTAY_PASSWORD_FILE or BACKSTAY_PASSWORD, or run it in a terminal")
	}
	fmt.Fprint(a.stderr, prompt)
	data, err := term.ReadPassword(int(a.stdin.Fd()))
	fmt.Fprintln(a.stderr)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("passphrase prompt: %w", err)
	}
	return onePassphrase(data, "the prompt")
}

// newPassphrase is passphrase, asked twice where it is typed.
func (a *app) newPassphrase() (secret.Bytes, error) {
	p, err := a.passphrase("New passphrase: ")
	if err != nil || a.hasPassphrase() {
		return p, err
	}
	again, err := a.passphrase("The same again: ")
	if err != nil {
		return again, err
	}
	if !p.Equal(again) {
		return again, errors.New("the two passphrases differ")
	}
	return p, nil
}

// onePassphrase drops one line end, which editors and echo leave behind.
func onePassphrase(data []byte, from string) (secret.Bytes, error) {
	defer clear(data)
	p := bytes.TrimSuffix(bytes.TrimSuffix(data, []byte("\n")), []byte("\r"))
	switch {
	case len(p) == 0:
		return secret.Bytes{}, fmt.Errorf("the passphrase from %s is empty: %w", from, fault.ErrKey)
	case bytes.ContainsAny(p, "\n\r"):
		return secret.Bytes{}, fmt.Errorf("%s holds more than one line: %w", from, fault.ErrKey)
	}
	return secret.New(p), nil
}

func (a *app) readSecretFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 && runtime.GOOS != "windows" {
		a.say("warning: %s can be read by others; run: chmod 600 %s", path, path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxPassphraseBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxPassphraseBytes {
		return nil, fmt.Errorf("%s is longer than %d bytes", path, maxPassphraseBytes)
	}
	return data, nil
}
