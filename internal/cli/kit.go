package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/secret"
)

// A kit is a recovery kit on its way to a file or to stdout. It is written
// before its key is stored, so that no key exists that nobody has, and taken
// away again if the key could not be stored.
type kit struct {
	app  *app
	to   string // a path, or "-"
	repo string // its URL
	made bool   // the file is there and is ours
}

// recoveryKey makes a new recovery key that goes into a kit.
func (k *kit) recoveryKey(label string) (repo.NewKey, error) {
	if k.to == "-" && k.app.json {
		return repo.NewKey{}, usage("--recovery-kit - prints a secret on stdout, where --json prints the result: name a file")
	}
	nk := repo.NewKey{Label: label, Recovery: secret.NewRecovery()}
	nk.Before = func(o repo.KeyObjects) error { return k.write(kitText(o, k.repo, nk.Recovery)) }
	return nk, nil
}

func (k *kit) write(text string) error {
	if k.to == "-" {
		_, err := io.WriteString(k.app.stdout, text)
		return err
	}
	f, err := os.OpenFile(k.to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("recovery kit: %w", err)
	}
	k.made = true
	_, err = io.WriteString(f, text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("recovery kit %s: %w", k.to, err)
	}
	return nil
}

// end takes a kit away that opens nothing, because err came after it.
func (k *kit) end(err error) {
	switch {
	case err == nil && k.to == "-":
		k.app.say("print the recovery kit above, or write it down, and keep it away from the repository: it is not shown again")
	case err == nil:
		k.app.say("print %s, keep it away from the repository and delete the file: it is not written again", k.to)
	case k.made:
		os.Remove(k.to)
	case k.to == "-":
		k.app.say("the recovery kit above opens nothing: throw it away")
	}
}

// kitText is what somebody needs who has this paper, the store and nothing else.
func kitText(o repo.KeyObjects, url string, key secret.Bytes) string {
	var s strings.Builder
	fmt.Fprintf(&s, `BACKSTAY RECOVERY KIT

Whoever holds this can read every backup in the repository below. Keep it on
paper, away from the repository. To make it worthless:
backstay repo key remove %[1]s

repository     %[2]s
repository id  %[3]s
key            %[1]s
made           %[4]s, by backstay %[5]s

recovery key, typed wherever a passphrase is asked for, in any case, with or
without dashes:

    %[6]s

TO RESTORE

1. Install backstay on any Linux machine that reaches the repository. For a
   store that asks for credentials of its own (S3, SFTP) have those at hand: they
   are not in this kit.
2. backstay point list --repo '%[2]s'
3. backstay restore VM --to vm.qcow2 --repo '%[2]s'

Without backstay: docs/format in its source says how every byte is stored, and
docs/format/restore.py restores from a directory.

IF repo.json OR keys/ OF THE REPOSITORY IS LOST

put these objects back, each one line with a line end, nothing else changed:

repo.json
%[7]s
keys/%[1]s
%[8]s`, o.Key, url, o.Repo, o.Created.Format("2006-01-02"), Version, secret.PrintRecovery(key), o.Config, o.Wrapped)
	return s.String()
}
