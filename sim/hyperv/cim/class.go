// Package cim is the object model of a simulated Hyper-V host: typed classes,
// their instances, embedded instances as XML, and queries over them.
package cim

import (
	_ "embed"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Namespaces of the classes that are known here.
const (
	Virtualization = "root/virtualization/v2"
	CIMV2          = "root/cimv2"
	MSCluster      = "root/MSCluster"
)

// A Field is a property of a class or a parameter of a method.
type Field struct {
	Name    string
	Type    string // "uint16", "string", …, "reference" or "object"
	Of      string // of a reference: the class it leads to; of an object: its own
	Array   bool
	Key     bool
	In, Out bool // of a parameter
	Default []string
}

// A Method is what an instance of a class can be asked to do. It returns a
// uint32 besides its out parameters.
type Method struct {
	Name   string
	Params []Field
}

// A Class is a type of instances. Classes are made once and never changed.
type Class struct {
	Namespace   string
	Name        string
	Super       *Class
	Association bool
	Abstract    bool
	Properties  []Field
	Methods     []Method
}

// Property finds a property; CIM's names know no case.
func (c *Class) Property(name string) (Field, bool) {
	for _, f := range c.Properties {
		if strings.EqualFold(f.Name, name) {
			return f, true
		}
	}
	return Field{}, false
}

// Method finds a method.
func (c *Class) Method(name string) (Method, bool) {
	for _, m := range c.Methods {
		if m.Name == name {
			return m, true
		}
	}
	return Method{}, false
}

// Param finds a parameter.
func (m Method) Param(name string) (Field, bool) {
	for _, f := range m.Params {
		if f.Name == name {
			return f, true
		}
	}
	return Field{}, false
}

// Is says whether c is the class of that name or derives from it.
func (c *Class) Is(name string) bool {
	for ; c != nil; c = c.Super {
		if strings.EqualFold(c.Name, name) {
			return true
		}
	}
	return false
}

//go:embed classes.txt
var table string

var classes = mustParse(table)

// Lookup finds a class; nil if there is none of that name.
func Lookup(namespace, name string) *Class {
	for _, c := range classes {
		if strings.EqualFold(c.Namespace, namespace) && strings.EqualFold(c.Name, name) {
			return c
		}
	}
	return nil
}

// Classes are all classes of a namespace, in the table's order.
func Classes(namespace string) []*Class {
	var out []*Class
	for _, c := range classes {
		if strings.EqualFold(c.Namespace, namespace) {
			out = append(out, c)
		}
	}
	return out
}

func mustParse(text string) []*Class {
	list, err := parse(text)
	if err != nil {
		panic(err) // the table is part of the program
	}
	return list
}

func parse(text string) ([]*Class, error) {
	var list []*Class
	supers := map[*Class]string{}
	namespace := ""
	for n, line := range strings.Split(text, "\n") {
		words := strings.Fields(line)
		if len(words) == 0 || words[0][0] == '#' {
			continue
		}
		wrong := func(what string) error { return fmt.Errorf("class table, line %d: %s in %q", n+1, what, line) }
		indent := len(line) - len(strings.TrimLeft(line, "\t"))
		switch {
		case words[0] == "namespace":
			namespace = words[1]
		case indent == 0:
			if len(words) != 4 || !slices.Contains([]string{"class", "association", "abstract"}, words[0]) {
				return nil, wrong("no class")
			}
			c := &Class{Namespace: namespace, Name: words[1], Association: words[0] == "association", Abstract: words[0] == "abstract"}
			supers[c] = words[3]
			list = append(list, c)
		case len(list) == 0:
			return nil, wrong("no class before a property")
		case indent == 1 && words[0] == "method":
			c := list[len(list)-1]
			c.Methods = append(c.Methods, Method{Name: words[1]})
		case indent == 1:
			c := list[len(list)-1]
			key := words[0] == "key"
			if key {
				words = words[1:]
			}
			_, literal, _ := strings.Cut(line, " = ")
			f, err := field(words, literal)
			if err != nil {
				return nil, wrong(err.Error())
			}
			f.Key = key
			c.Properties = append(c.Properties, f)
		default:
			c := list[len(list)-1]
			m := &c.Methods[len(c.Methods)-1]
			f, err := field(words[1:], "")
			if err != nil {
				return nil, wrong(err.Error())
			}
			f.In, f.Out = strings.HasPrefix(words[0], "in"), strings.HasSuffix(words[0], "out")
			m.Params = append(m.Params, f)
		}
	}
	for _, c := range list {
		for _, s := range list {
			if s.Name == supers[c] && s.Namespace == c.Namespace {
				c.Super = s
			}
		}
		if c.Super == nil && supers[c] != "-" {
			c.Super = &Class{Namespace: c.Namespace, Name: supers[c], Abstract: true}
		}
	}
	return list, nil
}

func field(words []string, literal string) (Field, error) {
	var f Field
	if kind := map[string]string{"ref": "reference", "object": "object"}[words[0]]; len(words) > 2 && kind != "" {
		f.Type, f.Of, words = kind, words[1], words[2:]
	} else if len(words) > 1 {
		f.Type, words = words[0], words[1:]
	} else {
		return f, fmt.Errorf("no type")
	}
	f.Name, f.Array = strings.CutSuffix(words[0], "[]")
	if literal != "" {
		literal = strings.Trim(literal, "{} ")
		for _, v := range strings.Split(literal, ", ") {
			v = strings.Trim(v, `" `)
			if err := Lexical(f.Type, v); err != nil {
				return f, err
			}
			f.Default = append(f.Default, v)
		}
	}
	if f.Of == "" && Lexical(f.Type, "") == errType {
		return f, fmt.Errorf("type %s", f.Type)
	}
	return f, nil
}

var errType = fmt.Errorf("no such type")

// Lexical says whether text is a value of that type.
func Lexical(typ, text string) error {
	integer := func(low int64, high uint64) error {
		if low < 0 {
			v, err := strconv.ParseInt(text, 10, 64)
			if err == nil && (v < low || v > int64(high)) {
				err = strconv.ErrRange
			}
			return err
		}
		v, err := strconv.ParseUint(text, 10, 64)
		if err == nil && v > high {
			err = strconv.ErrRange
		}
		return err
	}
	switch typ {
	case "string", "reference", "object":
		return nil
	case "boolean":
		if text != "true" && text != "false" {
			return fmt.Errorf("%q is no boolean", text)
		}
		return nil
	case "uint8":
		return integer(0, math.MaxUint8)
	case "uint16":
		return integer(0, math.MaxUint16)
	case "uint32":
		return integer(0, math.MaxUint32)
	case "uint64":
		return integer(0, math.MaxUint64)
	case "sint8":
		return integer(math.MinInt8, math.MaxInt8)
	case "sint16":
		return integer(math.MinInt16, math.MaxInt16)
	case "sint32":
		return integer(math.MinInt32, math.MaxInt32)
	case "sint64":
		return integer(math.MinInt64, math.MaxInt64)
	case "datetime":
		if _, err := time.Parse(time.RFC3339Nano, text); err == nil {
			return nil
		}
		return dmtf(text)
	}
	return errType
}

// dmtf checks yyyymmddHHMMSS.mmmmmm±UUU and the interval ddddddddHHMMSS.mmmmmm:000.
func dmtf(text string) error {
	if len(text) != 25 || text[14] != '.' || !strings.ContainsRune("+-:", rune(text[21])) {
		return fmt.Errorf("%q is no datetime", text)
	}
	for i, c := range []byte(text) {
		if i != 14 && i != 21 && (c < '0' || c > '9') && c != '*' {
			return fmt.Errorf("%q is no datetime", text)
		}
	}
	return nil
}
