package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"filippo.io/age"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/keycommand"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/secret"
)

// A passphrase longer than this is a wrong file, and so is a recovery kit
// longer than that.
const (
	maxPassphraseBytes = 4096
	maxSecretFileBytes = 16 << 10
)

// credentials say where that comes from which opens one repository: from files
// and a command that flags name, then from the environment, then from a prompt.
// No flag and no argument holds a secret itself. What is run as a key command
// comes from here alone, and never from a repository.
type credentials struct {
	passwordFile string
	identityFile string
	keyCommand   string

	to string // "", "to-" or "new-": which flags and variables these are
}

// flag and env are the names that people know a setting by.
func (c *credentials) flag(name string) string { return "--" + c.to + name }

func (c *credentials) env(name string) string {
	return "BACKSTAY_" + strings.ToUpper(strings.ReplaceAll(c.to, "-", "_")) + name
}

func (c *credentials) addFlags(f *pflag.FlagSet, what string) {
	f.StringVar(&c.passwordFile, c.to+"password-file", "",
		fmt.Sprintf("file with the %spassphrase or recovery key (or %s, %s, or a prompt)", what, c.env("PASSWORD_FILE"), c.env("PASSWORD")))
	f.StringVar(&c.keyCommand, c.to+"key-command", "",
		fmt.Sprintf("program with arguments that keeps the %skey: it is run with wrap or unwrap (or %s)", what, c.env("KEY_COMMAND")))
}

func (c *credentials) addIdentityFlag(f *pflag.FlagSet, what string) {
	f.StringVar(&c.identityFile, c.to+"identity-file", "",
		fmt.Sprintf("file with age identities that open the %srepository (or %s)", what, c.env("IDENTITY_FILE")))
}

// first is the flag's value, or the environment's.
func (a *app) first(flag, env string) string {
	if flag != "" {
		return flag
	}
	return a.getenv(env)
}

func (a *app) identityPath(c *credentials) string {
	return a.first(c.identityFile, c.env("IDENTITY_FILE"))
}

func (a *app) commandLine(c *credentials) string {
	return a.first(c.keyCommand, c.env("KEY_COMMAND"))
}

func (a *app) hasPassphrase(c *credentials) bool {
	return c.passwordFile != "" || a.getenv(c.env("PASSWORD_FILE")) != "" || a.getenv(c.env("PASSWORD")) != ""
}

// atHand says whether anything is named that could open a repository.
func (a *app) atHand(c *credentials) bool {
	return a.hasPassphrase(c) || a.identityPath(c) != "" || a.commandLine(c) != ""
}

// key gathers what opens a repository: identities and a key command where they
// are named, otherwise the passphrase.
func (a *app) key(c *credentials) (repo.Key, error) {
	var k repo.Key
	var err error
	if k.Identities, err = a.identities(c); err != nil {
		return k, err
	}
	if cmd, err := a.keeper(c); err != nil {
		return k, err
	} else if cmd != nil {
		k.Keeper = cmd
	}
	if a.hasPassphrase(c) || k.Identities == nil && k.Keeper == nil {
		if k.Passphrase, err = a.passphrase(c, "Passphrase: "); err != nil {
			return k, err
		}
	}
	return k, nil
}

// identities gives nil where no file is named.
func (a *app) identities(c *credentials) ([]age.Identity, error) {
	path := a.identityPath(c)
	if path == "" {
		return nil, nil
	}
	data, err := a.readSecretFile(path, maxPassphraseBytes)
	if err != nil {
		return nil, withHint(fmt.Errorf("identity file: %w", err), "check %s or %s", c.flag("identity-file"), c.env("IDENTITY_FILE"))
	}
	ids, err := age.ParseIdentities(bytes.NewReader(data))
	clear(data)
	if err != nil {
		// The parser's text may quote the line it did not understand.
		return nil, withHint(fmt.Errorf("identity file %s: no age identities in it", path), "it must hold an identity as age-keygen writes it")
	}
	return ids, nil
}

// keeper gives nil where no key command is named.
func (a *app) keeper(c *credentials) (*keycommand.Command, error) {
	line := a.commandLine(c)
	if line == "" {
		return nil, nil
	}
	cmd, err := keycommand.Parse(line, a.stderr)
	if err != nil {
		return nil, usage("%s: %w", c.flag("key-command"), err)
	}
	return cmd, nil
}

// passphrase takes the passphrase from a file, the environment or a prompt.
func (a *app) passphrase(c *credentials, prompt string) (secret.Bytes, error) {
	if path := a.first(c.passwordFile, c.env("PASSWORD_FILE")); path != "" {
		data, err := a.readSecretFile(path, maxSecretFileBytes)
		if err != nil {
			return secret.Bytes{}, withHint(fmt.Errorf("password file: %w", err), "check %s or %s", c.flag("password-file"), c.env("PASSWORD_FILE"))
		}
		return onePassphrase(data, path)
	}
	if p := a.getenv(c.env("PASSWORD")); p != "" {
		return onePassphrase([]byte(p), c.env("PASSWORD"))
	}
	if a.stdin == nil || !term.IsTerminal(int(a.stdin.Fd())) {
		return secret.Bytes{}, withHint(fmt.Errorf("no passphrase given: %w", fault.ErrKey),
			"set %s, %s or %s, or run it in a terminal", c.flag("password-file"), c.env("PASSWORD_FILE"), c.env("PASSWORD"))
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
func (a *app) newPassphrase(c *credentials) (secret.Bytes, error) {
	p, err := a.passphrase(c, "New passphrase: ")
	if err != nil || a.hasPassphrase(c) {
		return p, err
	}
	again, err := a.passphrase(c, "The same again: ")
	if err != nil {
		return again, err
	}
	if !p.Equal(again) {
		return again, errors.New("the two passphrases differ")
	}
	return p, nil
}

// onePassphrase drops one line end, which editors and echo leave behind. Of a
// whole recovery kit it takes the recovery key.
func onePassphrase(data []byte, from string) (secret.Bytes, error) {
	defer clear(data)
	p := bytes.TrimSuffix(bytes.TrimSuffix(data, []byte("\n")), []byte("\r"))
	if bytes.ContainsAny(p, "\n\r") {
		for line := range bytes.Lines(p) {
			if key, err := secret.ParseRecovery(bytes.TrimSpace(line)); err == nil {
				return key, nil
			}
		}
		return secret.Bytes{}, fmt.Errorf("%s holds more than one line, and is no recovery kit: %w", from, fault.ErrKey)
	}
	switch {
	case len(p) == 0:
		return secret.Bytes{}, fmt.Errorf("the passphrase from %s is empty: %w", from, fault.ErrKey)
	case len(p) > maxPassphraseBytes:
		return secret.Bytes{}, fmt.Errorf("%s is longer than %d bytes: %w", from, maxPassphraseBytes, fault.ErrKey)
	}
	return secret.New(p), nil
}

func (a *app) readSecretFile(path string, most int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 && runtime.GOOS != "windows" {
		a.say("warning: %s can be read by others; run: chmod 600 %s", path, path)
	}
	data, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	if err != nil {
		return nil, err
	}
	if len(data) > most {
		clear(data)
		return nil, fmt.Errorf("%s is longer than %d bytes", path, most)
	}
	return data, nil
}
