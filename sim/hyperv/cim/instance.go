package cim

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A Value is what a property or a parameter holds. The zero Value is NULL.
type Value struct {
	Set    bool
	Items  []string  // one, or those of an array, as text
	Ref    *Ref      // of a reference
	Object *Instance // of an object
}

// Text is a value of one item.
func Text(s string) Value { return Value{Set: true, Items: []string{s}} }

// Number is a value of one integer.
func Number[T ~int | ~int64 | ~uint64 | ~uint32 | ~uint16](n T) Value {
	return Text(fmt.Sprint(n))
}

// Bool is a value of one boolean.
func Bool(b bool) Value { return Text(strconv.FormatBool(b)) }

// List is an array.
func List(items ...string) Value { return Value{Set: true, Items: items} }

// Holding is an object within another. It is not changed any more.
func Holding(i *Instance) Value { return Value{Set: true, Object: i} }

// To is a reference.
func To(r Ref) Value { return Value{Set: true, Ref: &r} }

// String is the first item, "" if there is none.
func (v Value) String() string {
	if len(v.Items) == 0 {
		return ""
	}
	return v.Items[0]
}

// Uint is the first item as a number, 0 if it is none.
func (v Value) Uint() uint64 {
	n, _ := strconv.ParseUint(v.String(), 10, 64)
	return n
}

// A Ref names an instance: its class and some or all of its keys.
type Ref struct {
	Namespace string
	Class     string
	Keys      map[string]string
}

// Equal says whether both name the same instance. Names of classes and keys,
// and their values, know no case; "CreationClassName" says only what the class
// says already.
func (r Ref) Equal(s Ref) bool {
	if !strings.EqualFold(r.Class, s.Class) {
		return false
	}
	get := func(keys map[string]string, name string) (string, bool) {
		for k, v := range keys {
			if strings.EqualFold(k, name) {
				return v, true
			}
		}
		return "", false
	}
	for k, v := range r.Keys {
		if w, ok := get(s.Keys, k); ok && !strings.EqualFold(v, w) {
			return false
		}
	}
	// One key besides the class's name must be in both, or one of them names no
	// other, as is enough for a service.
	others := func(keys map[string]string) (n int) {
		for k := range keys {
			if !strings.EqualFold(k, "CreationClassName") {
				n++
			}
		}
		return n
	}
	for k := range r.Keys {
		if _, ok := get(s.Keys, k); ok && !strings.EqualFold(k, "CreationClassName") {
			return true
		}
	}
	return others(r.Keys) == 0 || others(s.Keys) == 0
}

// Path is the object path as WMI writes it, without a host.
func (r Ref) Path() string {
	keys := make([]string, 0, len(r.Keys))
	for k := range r.Keys {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	var b strings.Builder
	fmt.Fprintf(&b, "%s:%s", strings.ReplaceAll(r.Namespace, "/", `\`), r.Class)
	for i, k := range keys {
		sep := ","
		if i == 0 {
			sep = "."
		}
		v := strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(r.Keys[k])
		fmt.Fprintf(&b, `%s%s="%s"`, sep, k, v)
	}
	return b.String()
}

// ParsePath reads an object path: [\\HOST\]NAMESPACE:CLASS.KEY="VALUE",…, or
// what ASSOCIATORS OF has in its braces, with the namespace left out and '
// for ". Backslashes in values are doubled.
func ParsePath(path, namespace string) (Ref, error) {
	r := Ref{Namespace: namespace, Keys: map[string]string{}}
	wrong := fmt.Errorf("%q is no object path", path)
	head, rest, ok := strings.Cut(path, ".")
	if !ok {
		return r, wrong
	}
	if i := strings.LastIndexByte(head, ':'); i >= 0 {
		ns := strings.ReplaceAll(head[:i], `\`, "/")
		if strings.HasPrefix(ns, "//") {
			_, ns, _ = strings.Cut(ns[2:], "/")
		}
		r.Namespace, head = ns, head[i+1:]
	}
	r.Class = head
	for rest != "" {
		key, value, ok := strings.Cut(rest, "=")
		if !ok || len(value) < 2 || value[0] != '"' && value[0] != '\'' {
			return r, wrong
		}
		quote := value[0]
		var v strings.Builder
		i := 1
		for ; i < len(value) && value[i] != quote; i++ {
			if value[i] == '\\' {
				if i++; i == len(value) {
					return r, wrong
				}
			}
			v.WriteByte(value[i])
		}
		if i >= len(value) {
			return r, wrong
		}
		r.Keys[strings.TrimSpace(key)] = v.String()
		if rest = value[i+1:]; rest != "" {
			if rest[0] != ',' {
				return r, wrong
			}
			rest = rest[1:]
		}
	}
	if r.Class == "" || len(r.Keys) == 0 {
		return r, wrong
	}
	return r, nil
}

// An Instance is a set of values of the properties of a class.
type Instance struct {
	Class  *Class
	values map[string]Value
}

// New makes an instance with the class's defaults. The class must exist.
func New(namespace, class string) *Instance {
	c := Lookup(namespace, class)
	if c == nil {
		panic("no class " + class)
	}
	inst := &Instance{Class: c, values: map[string]Value{}}
	for _, f := range c.Properties {
		if f.Default != nil {
			inst.values[f.Name] = List(f.Default...)
		}
	}
	if _, ok := c.Property("CreationClassName"); ok {
		inst.values["CreationClassName"] = Text(c.Name)
	}
	return inst
}

// Clone is a copy.
func (i *Instance) Clone() *Instance {
	c := &Instance{Class: i.Class, values: map[string]Value{}}
	for k, v := range i.values {
		c.values[k] = v
	}
	return c
}

// Get is the value of a property; NULL if it was never set.
func (i *Instance) Get(name string) Value {
	if f, ok := i.Class.Property(name); ok {
		return i.values[f.Name]
	}
	return Value{}
}

// Put sets a property, which the class must have, to a value of its type.
func (i *Instance) Put(name string, v Value) *Instance {
	f, ok := i.Class.Property(name)
	if !ok {
		panic(i.Class.Name + " has no property " + name)
	}
	if err := Check(f, v); err != nil {
		panic(fmt.Sprintf("%s.%s: %v", i.Class.Name, name, err))
	}
	i.values[f.Name] = v
	return i
}

// Check says whether v fits f.
func Check(f Field, v Value) error {
	if !v.Set {
		return nil
	}
	if f.Type == "reference" && !f.Array {
		if v.Ref == nil {
			return fmt.Errorf("no reference")
		}
		return nil
	}
	if f.Type == "object" {
		if v.Object == nil || !v.Object.Class.Is(f.Of) {
			return fmt.Errorf("no object of %s", f.Of)
		}
		return nil
	}
	if !f.Array && len(v.Items) != 1 {
		return fmt.Errorf("%d values for one", len(v.Items))
	}
	for _, item := range v.Items {
		if err := Lexical(f.Type, item); err != nil {
			return err
		}
	}
	return nil
}

// Ref names i by all its keys.
func (i *Instance) Ref() Ref {
	r := Ref{Namespace: i.Class.Namespace, Class: i.Class.Name, Keys: map[string]string{}}
	for _, f := range i.Class.Properties {
		if f.Key && f.Type != "reference" {
			r.Keys[f.Name] = i.values[f.Name].String()
		}
	}
	return r
}
