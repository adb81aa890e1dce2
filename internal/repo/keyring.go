package repo

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo/internal/object"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// ErrLastKey says that no key would be left which opens the repository.
var ErrLastKey = errors.New("no key would be left that opens the repository")

// ErrUnproven says that only keys would be left of which nobody has shown that
// they open the repository.
var ErrUnproven = errors.New("only keys would be left that nobody has ever opened it with")

// ErrOldKeyStays says that a rotation made the new key, and could not remove
// the old one.
var ErrOldKeyStays = errors.New("the old key is still there")

// keysLock is held by whoever changes keys/, where the store has locks. It is a
// courtesy: remove looks again after it removed.
const keysLock = "keys"

// States of a key of a repository.
const (
	KeySound     = "sound"
	KeyUnsigned  = "unsigned"  // made before keys were vouched for; it may be anybody's
	KeyForeign   = "foreign"   // not made by somebody who could open the repository
	KeyDamaged   = "damaged"   // its checksum or its form is wrong
	KeyUnknown   = "unknown"   // of a newer format or kind
	KeyUnchecked = "unchecked" // looked at without a key
)

// A KeyInfo says what one key of a repository is. It holds no secret.
type KeyInfo struct {
	ID        string     `json:"id"`
	Kind      string     `json:"kind,omitempty"`
	Label     string     `json:"label,omitempty"`
	Created   *time.Time `json:"created,omitempty"`
	Recipient string     `json:"recipient,omitempty"` // of an age key
	Proven    bool       `json:"proven"`              // somebody opened it when it was made, or now
	Opened    bool       `json:"opened"`              // it is what opened the repository now
	State     string     `json:"state"`
}

// counts says whether the key is one that people may rely on.
func (k *KeyInfo) counts() bool { return k.Opened || k.State == KeySound || k.State == KeyUnsigned }

// A Keyring is the keys of a repository, with the master key that they all
// wrap. Adding, removing and rotating them touches no data and changes neither
// the master key nor what it sealed.
type Keyring struct {
	st      blob.Store
	id      [16]byte
	config  []byte    // repo.json
	master  *seal.Key // behind a pointer, so that no way of printing follows it
	derived *seal.Keys
	opened  string // id of the key that opened it
}

// OpenKeyring opens the keys of the repository in st. Errors are those of Open.
func OpenKeyring(ctx context.Context, st blob.Store, k Key) (*Keyring, error) {
	r, raw, err := open(ctx, st)
	if err != nil {
		return nil, err
	}
	got, err := unwrap(ctx, st, r.id, raw, k)
	if err != nil {
		return nil, err
	}
	return &Keyring{st: st, id: r.id, config: raw, master: &got.master, derived: got.derived, opened: got.by}, nil
}

// Keys lists the keys of the repository as they look to somebody who has none
// of them.
func (r *Repository) Keys(ctx context.Context) ([]KeyInfo, error) {
	return (&Keyring{st: r.st, id: r.id}).List(ctx)
}

// Opened is the id of the key that opened the repository.
func (k *Keyring) Opened() string { return k.opened }

// Store is the URL of the store that the keys are in.
func (k *Keyring) Store() string { return k.st.String() }

// List gives all keys, by id.
func (k *Keyring) List(ctx context.Context) ([]KeyInfo, error) {
	var all []KeyInfo
	for o, err := range k.st.List(ctx, keysPrefix) {
		if err != nil {
			return nil, err
		}
		in := KeyInfo{ID: strings.TrimPrefix(o.Name, keysPrefix)}
		w, raw, err := readKey(ctx, k.st, o.Name)
		switch {
		case errors.Is(err, fault.ErrNotFound):
			continue // removed meanwhile
		case errors.Is(err, fault.ErrCorrupt):
			in.State = KeyDamaged
		case err != nil:
			return nil, err
		default:
			k.describe(&in, o.Name, w, raw)
		}
		in.Opened = in.ID == k.opened
		in.Proven = in.Proven || in.Opened
		all = append(all, in)
	}
	return all, nil
}

func (k *Keyring) describe(in *KeyInfo, name string, w wrappedKey, raw []byte) {
	in.Kind, in.Recipient = w.Kind, w.Recipient
	switch w.Kind {
	case KindPassphrase, KindRecovery, KindAge, KindCommand:
	default:
		in.State = KeyUnknown
		return
	}
	if w.Format > formatVersion {
		in.State = KeyUnknown
		return
	}
	if k.derived == nil {
		in.State = KeyUnchecked
		return
	}
	var sealed struct{ Sealed string }
	if json.Unmarshal(raw, &sealed) == nil && sealed.Sealed == "" {
		in.State = KeyUnsigned
		return
	}
	var note keyNote
	plain, err := object.DecodeSealed(name, raw, &k.derived.Meta, object.Binding{Repo: k.id, Name: name}, &w)
	if err == nil {
		err = json.Unmarshal(plain, &note)
	}
	if err != nil {
		in.State = KeyForeign
		return
	}
	in.State, in.Label, in.Created, in.Proven = KeySound, note.Label, &note.Created, note.Proven
}

// Find gives the one key that ref names: its id, the first four or more digits
// of it, or its label.
func (k *Keyring) Find(ctx context.Context, ref string) (KeyInfo, error) {
	all, err := k.List(ctx)
	if err != nil {
		return KeyInfo{}, err
	}
	return find(all, ref)
}

func find(all []KeyInfo, ref string) (KeyInfo, error) {
	var found []KeyInfo
	for _, in := range all {
		if in.ID == ref {
			return in, nil
		}
		if in.Label == ref && ref != "" || len(ref) >= 4 && strings.HasPrefix(in.ID, ref) {
			found = append(found, in)
		}
	}
	switch len(found) {
	case 0:
		return KeyInfo{}, fmt.Errorf("key %s: %w", ref, fault.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return KeyInfo{}, fmt.Errorf("key %s: %d keys are called so", ref, len(found))
}

// Add makes another way into the repository. When it returns, the key is
// stored and what it was made of has opened it; only of an age recipient
// without its identity nobody can know (KeyInfo.Proven). A label that another key
// has gives fault.ErrExists: nobody could name one of the two by it.
func (k *Keyring) Add(ctx context.Context, nk NewKey) (KeyInfo, error) {
	release, err := k.lock(ctx)
	if err != nil {
		return KeyInfo{}, err
	}
	defer release()
	if nk.Label != "" {
		all, err := k.List(ctx)
		if err != nil {
			return KeyInfo{}, err
		}
		for _, in := range all {
			if in.Label == nk.Label {
				return KeyInfo{}, fmt.Errorf("key %s (%s) is called %q: %w", in.ID, in.Kind, nk.Label, fault.ErrExists)
			}
		}
	}
	return k.store(ctx, nk)
}

func (k *Keyring) lock(ctx context.Context) (release func(), err error) {
	if l, ok := k.st.(blob.Locker); ok {
		return l.Lock(ctx, keysLock, true)
	}
	return func() {}, nil
}

// store proves the key before it is stored and reads it back after.
func (k *Keyring) store(ctx context.Context, nk NewKey) (in KeyInfo, err error) {
	if err := checkLabel(nk.Label); err != nil {
		return in, err
	}
	w, err := nk.wrap(ctx, *k.master, k.id)
	if err != nil {
		return in, err
	}
	var id [8]byte
	rand.Read(id[:])
	made := KeyInfo{ID: hex.EncodeToString(id[:]), Kind: w.Kind, Label: nk.Label, Recipient: w.Recipient, State: KeySound}
	name := keysPrefix + made.ID
	switch got, err := w.unwrap(ctx, name, k.id, nk.opens()); {
	case err == nil && subtle.ConstantTimeCompare(got[:], k.master[:]) == 1:
		made.Proven = true
	case w.Kind == KindAge && errors.Is(err, fault.ErrKey):
	case err == nil:
		return KeyInfo{}, fmt.Errorf("the new key gives another master key back than it was made of")
	default:
		return KeyInfo{}, fmt.Errorf("the new key does not open what it closed: %w", err)
	}
	if nk.Created.IsZero() {
		nk.Created = time.Now()
	}
	created := nk.Created.UTC().Truncate(time.Second)
	made.Created = &created
	plain, err := json.Marshal(keyNote{Label: nk.Label, Created: created, Proven: made.Proven})
	if err != nil {
		return KeyInfo{}, err
	}
	b, err := object.EncodeSealed(w, &k.derived.Meta, object.Binding{Repo: k.id, Name: name}, plain)
	if err != nil {
		return KeyInfo{}, err
	}
	if nk.Before != nil {
		if err := nk.Before(KeyObjects{Repo: hex.EncodeToString(k.id[:]), Key: made.ID, Created: created, Config: k.config, Wrapped: b}); err != nil {
			return KeyInfo{}, err
		}
	}
	if err := create(ctx, k.st, name, b); err != nil {
		return KeyInfo{}, fmt.Errorf("store the new key: %w", err)
	}
	back, err := readObject(ctx, k.st, name)
	if err == nil && !bytes.Equal(back, b) {
		err = fault.Corrupt(name, -1, "the store gives back other bytes than it was given")
	}
	if err != nil {
		return KeyInfo{}, errors.Join(fmt.Errorf("read the new key back: %w", err), k.st.Delete(ctx, name))
	}
	return made, nil
}

// leaves says why the keys without gone may not be all that is left.
func leaves(all []KeyInfo, gone string, more []KeyInfo, force bool) error {
	counting, proven := 0, 0
	for _, in := range append(append([]KeyInfo(nil), all...), more...) {
		if in.ID == gone || !in.counts() {
			continue
		}
		counting++
		if in.Proven {
			proven++
		}
	}
	switch {
	case counting == 0:
		return ErrLastKey
	case proven == 0 && !force:
		return ErrUnproven
	}
	return nil
}

// Remove deletes a key. What it unlocked stays unlocked for whoever has a copy
// of the key object and its secret: only new data in a new repository is out of
// their reach. It gives ErrLastKey, and ErrUnproven without force.
func (k *Keyring) Remove(ctx context.Context, id string, force bool) error {
	release, err := k.lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	return k.remove(ctx, id, force)
}

func (k *Keyring) remove(ctx context.Context, id string, force bool) error {
	all, err := k.List(ctx)
	if err != nil {
		return err
	}
	in, err := find(all, id)
	if err != nil {
		return err
	}
	name := keysPrefix + in.ID
	// What opens nothing can always go.
	if in.counts() {
		if err := leaves(all, in.ID, nil, force); err != nil {
			return err
		}
	}
	old, err := readObject(ctx, k.st, name)
	if err != nil {
		return err
	}
	if err := k.st.Delete(ctx, name); err != nil {
		return err
	}
	if !in.counts() {
		return nil
	}
	// Somebody else may have removed the one that this removal relied on. Both
	// look after they removed, so at least one of them puts his back.
	if all, err = k.List(ctx); err == nil {
		err = leaves(all, in.ID, nil, force)
	}
	if err != nil {
		back := create(context.WithoutCancel(ctx), k.st, name, old)
		return errors.Join(fmt.Errorf("another key was removed at the same time, or cannot be read; key %s was put back: %w", in.ID, err), back)
	}
	return nil
}

// Rotate puts a new key in the place of the one called id: the new one is made,
// proven and stored before the old one is deleted, so however far it gets one
// of them opens the repository. The label stays unless there is a new one. The
// master key stays: see Remove.
func (k *Keyring) Rotate(ctx context.Context, id string, nk NewKey, force bool) (KeyInfo, error) {
	release, err := k.lock(ctx)
	if err != nil {
		return KeyInfo{}, err
	}
	defer release()
	all, err := k.List(ctx)
	if err != nil {
		return KeyInfo{}, err
	}
	old, err := find(all, id)
	if err != nil {
		return KeyInfo{}, err
	}
	if nk.Label == "" {
		nk.Label = old.Label
	}
	// Only a recipient can turn out unproven: say so before anything is stored.
	if nk.Recipient != nil && len(nk.Identities) == 0 {
		if err := leaves(all, old.ID, []KeyInfo{{State: KeySound}}, force); err != nil {
			return KeyInfo{}, err
		}
	}
	in, err := k.store(ctx, nk)
	if err != nil {
		return in, err
	}
	if err := k.remove(ctx, old.ID, force); err != nil {
		return in, fmt.Errorf("key %s is made and opens the repository, but %w: %w", in.ID, ErrOldKeyStays, err)
	}
	if k.opened == old.ID {
		k.opened, in.Opened = in.ID, true
	}
	return in, nil
}
