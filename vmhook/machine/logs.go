package machine

import (
	"errors"
	"io"
	"os"

	"github.com/cairnstore/cairn/proto/status"
)

// logMaxBytes bounds each log of a machine: a guest can write to its console
// for ever. When one has grown beyond, it becomes FILE.old, so twice this much
// is kept on disk.
const logMaxBytes = 16 << 20

// trimLogs is called every few seconds by the monitor.
func (m *Machine) trimLogs() {
	for _, file := range []string{m.files.consoleLog, m.files.log} {
		if err := trimLog(file, logMaxBytes); err != nil {
			m.note(err.Error())
		}
	}
}

// trimLog copies a log that is too long to FILE.old and empties it. It is not
// renamed, because QEMU has it open; QEMU appends, so what it writes next
// stands at the beginning. What it writes between copying and emptying is lost.
func trimLog(file string, maxBytes int64) error {
	st, err := os.Stat(file)
	if errors.Is(err, os.ErrNotExist) || err == nil && st.Size() <= maxBytes {
		return nil
	}
	if err != nil {
		return status.Errorf(status.IO, "VM log: %w", err)
	}
	if err := copyTail(file, file+".old", maxBytes); err != nil {
		return status.Errorf(status.IO, "VM log: %w", err)
	}
	if err := os.Truncate(file, 0); err != nil {
		return status.Errorf(status.IO, "VM log: %w", err)
	}
	return nil
}

// copyTail copies at most the last maxBytes of a file.
func copyTail(from, to string, maxBytes int64) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	if _, err := in.Seek(-maxBytes, io.SeekEnd); err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	_, err = io.Copy(out, io.LimitReader(in, maxBytes))
	return err
}
