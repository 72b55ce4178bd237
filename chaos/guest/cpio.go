package guest

import (
	"bytes"
	"fmt"
)

// archive is a cpio archive in the newc format the kernel unpacks as its first
// file system. Source: Documentation/driver-api/early-userspace/buffer-format
// of the Linux kernel: "070701", 13 fields of 8 hexadecimal digits, the name
// with its NUL, data; name and data each padded to 4 bytes.
//
// Times and owners are 0, so that the same parts give the same bytes.
type archive struct {
	buf bytes.Buffer
	ino int
}

const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeLink = 0o120000
	modeChar = 0o020000
)

func (a *archive) dir(name string)                         { a.entry(name, modeDir|0o755, nil, 0, 0) }
func (a *archive) file(name string, perm int, data []byte) { a.entry(name, modeFile|perm, data, 0, 0) }
func (a *archive) link(name, target string)                { a.entry(name, modeLink|0o777, []byte(target), 0, 0) }
func (a *archive) char(name string, major, minor int) {
	a.entry(name, modeChar|0o600, nil, major, minor)
}

func (a *archive) entry(name string, mode int, data []byte, major, minor int) {
	a.ino++
	fields := [13]int{a.ino, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name) + 1, 0} // ino mode uid gid nlink mtime size dev dev rdev rdev namesize check
	a.buf.WriteString("070701")
	for _, f := range fields {
		fmt.Fprintf(&a.buf, "%08x", f)
	}
	a.buf.WriteString(name)
	a.buf.WriteByte(0)
	a.pad()
	a.buf.Write(data)
	a.pad()
}

func (a *archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

// bytes ends the archive and returns it.
func (a *archive) bytes() []byte {
	a.entry("TRAILER!!!", 0, nil, 0, 0)
	return a.buf.Bytes()
}
