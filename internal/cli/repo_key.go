package cli

import (
	"context"
	"errors"
	"fmt"
	"text/tabwriter"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo"
)

func (a *app) repoKeyCmd() *cobra.Command {
	cmd := noun("key", "list, add, remove and rotate what opens a repository",
		a.repoKeyListCmd(), a.repoKeyAddCmd(), a.repoKeyRemoveCmd(), a.repoKeyRotateCmd())
	cmd.Long = `List, add, remove and rotate what opens a repository: passphrases, recovery
keys, age recipients, and keys kept by a program of yours.

All of them wrap one master key, which was made with the repository and never
changes: so keys come and go in an instant and no data is touched. It also means
that removing or rotating a key does not undo what somebody could read already.
Who has a copy of the repository from before, and the old secret, can still open
that copy; and who ever got hold of the master key itself can read everything
that this repository will ever hold. If that may have happened, make a new
repository and move the points there with "backstay repo copy --to".`
	return cmd
}

// keyFlags say what a new key is made of.
type keyFlags struct {
	label     string
	recipient string
	kit       string
	force     bool
	cred      credentials // of the new key
}

func (o *keyFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	o.cred.to = "new-"
	o.cred.addFlags(f, "new ")
	f.StringVar(&o.label, "label", "", "whose key it is or where it lies, for people; encrypted like all else")
	f.StringVar(&o.recipient, "recipient", "", "age recipient (age1…) instead of a passphrase")
	f.StringVar(&o.kit, "recovery-kit", "", "make a recovery key and write it, with what a restore needs, to this new file (- for stdout)")
}

// newKey makes a key of what the flags say; end must be called with how it went.
func (a *app) newKey(o *keyFlags, url string) (nk repo.NewKey, end func(error), err error) {
	end = func(error) {}
	n := 0
	for _, given := range []bool{o.recipient != "", o.kit != "", a.commandLine(&o.cred) != "", o.cred.passwordFile != ""} {
		if given {
			n++
		}
	}
	if n > 1 {
		return nk, end, usage("one key at a time: --new-password-file, --recipient, --recovery-kit or --new-key-command")
	}
	nk.Label = o.label
	switch {
	case o.kit != "":
		k := &kit{app: a, to: o.kit, repo: url}
		nk, err = k.recoveryKey(o.label)
		end = k.end
	case o.recipient != "":
		rec, perr := age.ParseX25519Recipient(o.recipient)
		if perr != nil {
			return nk, end, usage("--recipient %q: not an age X25519 recipient", o.recipient)
		}
		nk.Recipient = rec
		nk.Identities, err = a.identities(&a.cred)
	case a.commandLine(&o.cred) != "":
		nk.Keeper, err = a.keeper(&o.cred)
	default:
		nk.Passphrase, err = a.newPassphrase(&o.cred)
	}
	return nk, end, err
}

// openKeyring opens the repository's keys with whatever key the user gave.
func (a *app) openKeyring(ctx context.Context) (*repo.Keyring, error) {
	return unlock(ctx, a, repo.OpenKeyring)
}

func (a *app) repoKeyListCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "list what opens a repository",
		Long: `List what opens a repository, and which key did so now. Labels and times are
encrypted: without a key at hand only ids and kinds are listed.

A key is unproven if nobody has opened the repository with it yet, which can
only be of an age recipient. One that is foreign was put there by somebody who
could not open the repository: it is not yours, and "repo key remove" is for it.`,
		Example: `  backstay repo key list --repo /srv/backup
  backstay repo key list --json --repo s3://s3.example.com/backups/site-a`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			keys, err := a.listKeys(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				for _, k := range keys {
					if err := a.printJSON(k); err != nil {
						return err
					}
				}
				return nil
			}
			a.printKeys(keys)
			return nil
		},
	}
}

func (a *app) listKeys(ctx context.Context) ([]repo.KeyInfo, error) {
	if a.atHand(&a.cred) || a.onTerminal() {
		ring, err := a.openKeyring(ctx)
		if err != nil {
			return nil, err
		}
		return ring.List(ctx)
	}
	r, err := a.openCareful(ctx, false)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return r.Keys(ctx)
}

func (a *app) printKeys(keys []repo.KeyInfo) {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "KEY\tKIND\tMADE\tLABEL\tNOTE")
	for _, k := range keys {
		made := ""
		if k.Created != nil {
			made = k.Created.Local().Format("2006-01-02 15:04")
		}
		label := k.Label
		if label == "" {
			label = k.Recipient
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", clean(k.ID), clean(k.Kind), made, clean(label), keyNote(k))
	}
	w.Flush()
}

// keyNote is what people should know of a key.
func keyNote(k repo.KeyInfo) string {
	switch {
	case k.Opened:
		return "opened the repository now"
	case k.State == repo.KeyUnsigned:
		return "UNSIGNED: made by an early version, or by a stranger"
	case k.State == repo.KeyForeign:
		return "FOREIGN: not made with this repository's key"
	case k.State == repo.KeyDamaged:
		return "DAMAGED"
	case k.State == repo.KeyUnknown:
		return "of a newer version"
	case k.State == repo.KeySound && !k.Proven:
		return "unproven"
	}
	return ""
}

func (a *app) repoKeyAddCmd() *cobra.Command {
	var o keyFlags
	cmd := &cobra.Command{
		Use:   "add",
		Short: "make another key open a repository",
		Long: `Make another key open a repository, without touching data: a passphrase by
default, an age recipient with --recipient, a recovery key on paper with
--recovery-kit, or one that a program of yours keeps with --new-key-command. The
key is opened once before it is stored, so that it is known to work; of an age
recipient that is only possible with its --identity-file at hand.

A key command is run with one more argument, "wrap" or "unwrap". It reads from
stdin and writes to stdout: 48 secret bytes on one side, up to 64 KiB of whatever
it made of them on the other. Exit status 0 within two minutes is success. It is
run without a shell, BACKSTAY_REPOSITORY_ID names the repository, and which
program it is never comes from the repository.`,
		Example: `  backstay repo key add --label bob --new-password-file /root/bob.pass --repo /srv/backup
  backstay repo key add --label "the safe" --recovery-kit kit.txt --repo /srv/backup
  backstay repo key add --recipient age1qyqszqgpqyqszqgpqyqszqgpqyqszqgpqyqszqgpqyqszqgpqyqs3290gq --repo /srv/backup
  backstay repo key add --label kms --new-key-command '/usr/local/bin/kms-key backup' --repo /srv/backup`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ring, err := a.openKeyring(cmd.Context())
			if err != nil {
				return err
			}
			nk, end, err := a.newKey(&o, ring.Store())
			if err != nil {
				return err
			}
			in, err := ring.Add(cmd.Context(), nk)
			end(err)
			if err != nil {
				return keyHint(fmt.Errorf("repository %s: %w", ring.Store(), err))
			}
			if a.json {
				return a.printJSON(in)
			}
			fmt.Fprintf(a.stdout, "added key %s (%s)\n", in.ID, in.Kind)
			a.sayUnproven(in)
			return nil
		},
	}
	o.add(cmd)
	return cmd
}

func (a *app) sayUnproven(in repo.KeyInfo) {
	if !in.Proven {
		a.say("warning: nobody has shown that %s opens the repository; try it with --identity-file and \"backstay repo key list\"", in.ID)
	}
}

func (a *app) repoKeyRemoveCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "remove KEY",
		Short: "make a key open a repository no more",
		Long: `Make a key open a repository no more. KEY is its id, the beginning of one, or
its label. The last one that opens the repository stays, whatever is said; if
only age recipients would be left that nobody has ever opened it with, --force is
asked for.

Copies of the repository that were made before still have the key.`,
		Example: `  backstay repo key remove bob --repo /srv/backup
  backstay repo key remove 5c1f9a3e77d0b248 --repo /srv/backup`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			ring, err := a.openKeyring(ctx)
			if err != nil {
				return err
			}
			in, err := ring.Find(ctx, args[0])
			if err != nil {
				return keyHint(err)
			}
			if err := ring.Remove(ctx, in.ID, force); err != nil {
				return keyHint(fmt.Errorf("key %s: %w", in.ID, err))
			}
			if a.json {
				return a.printJSON(map[string]any{"removed": in.ID})
			}
			fmt.Fprintf(a.stdout, "removed key %s (%s)\n", clean(in.ID), clean(in.Kind))
			return nil
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also if nobody has shown that what is left opens the repository")
	return cmd
}

func (a *app) repoKeyRotateCmd() *cobra.Command {
	var o keyFlags
	cmd := &cobra.Command{
		Use:   "rotate [KEY]",
		Short: "put a new key in the place of another",
		Long: `Put a new key in the place of another, by default of the one that opens the
repository now. The new one is made, proven and stored before the old one goes:
however far it gets, one of them opens the repository. The label stays.

The master key that both wrap stays too. Rotating makes an old passphrase
worthless for this repository from now on; it does not help against somebody who
has a copy of the repository from before and the old passphrase, nor against one
who has the master key. For that make a new repository and use "backstay repo
copy --to".`,
		Example: `  backstay repo key rotate --new-password-file /root/new.pass --repo /srv/backup
  backstay repo key rotate "the safe" --recovery-kit kit.txt --repo /srv/backup`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			ring, err := a.openKeyring(ctx)
			if err != nil {
				return err
			}
			old := ring.Opened()
			if len(args) == 1 {
				in, err := ring.Find(ctx, args[0])
				if err != nil {
					return keyHint(err)
				}
				old = in.ID
			}
			nk, end, err := a.newKey(&o, ring.Store())
			if err != nil {
				return err
			}
			in, err := ring.Rotate(ctx, old, nk, o.force)
			stored := in.ID != "" && errors.Is(err, repo.ErrOldKeyStays)
			if stored {
				end(nil)
			} else {
				end(err)
			}
			if err != nil {
				return keyHint(fmt.Errorf("key %s: %w", old, err))
			}
			if a.json {
				return a.printJSON(map[string]any{"added": in, "removed": old})
			}
			fmt.Fprintf(a.stdout, "key %s (%s) takes the place of %s\n", in.ID, in.Kind, old)
			a.sayUnproven(in)
			return nil
		},
	}
	o.add(cmd)
	cmd.Flags().BoolVar(&o.force, "force", false, "also if nobody has shown that what is left opens the repository")
	return cmd
}

func keyHint(err error) error {
	switch {
	case errors.Is(err, repo.ErrLastKey):
		return coded{code: exitRefused, err: err, hint: `add another one first, with "backstay repo key add"`}
	case errors.Is(err, repo.ErrUnproven):
		return coded{code: exitRefused, err: err, hint: "open the repository with the identity that is left (--identity-file) to show that it works, or say --force"}
	case errors.Is(err, fault.ErrExists):
		return withHint(err, `say another --label, or put a new key in the place of that one with "backstay repo key rotate"`)
	case errors.Is(err, fault.ErrNotFound):
		return withHint(err, `"backstay repo key list" shows which there are`)
	}
	return err
}
