//go:build manual

package manual

import (
	"cmp"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// Write writes what root's command line tells below the folder that is the
// program's only argument, which stands for /usr/share. The pages' date is
// SOURCE_DATE_EPOCH.
func Write(root *cobra.Command) {
	if len(os.Args) != 2 {
		log.Fatalf("usage: %s FOLDER", os.Args[0])
	}
	if err := write(root, os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

func write(root *cobra.Command, share string) error {
	seconds, err := strconv.ParseInt(cmp.Or(os.Getenv("SOURCE_DATE_EPOCH"), "0"), 10, 64)
	if err != nil {
		return fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
	}
	date := time.Unix(seconds, 0).UTC()
	for path, generate := range map[string]func(string) error{
		"man/man1": func(dir string) error {
			return doc.GenManTree(root, &doc.GenManHeader{Section: "1", Date: &date, Source: "kvmeter", Manual: "kvmeter"}, dir)
		},
		"bash-completion/completions": func(dir string) error {
			return root.GenBashCompletionFileV2(filepath.Join(dir, root.Name()), true)
		},
		"zsh/vendor-completions": func(dir string) error {
			return root.GenZshCompletionFile(filepath.Join(dir, "_"+root.Name()))
		},
		"fish/vendor_completions.d": func(dir string) error {
			return root.GenFishCompletionFile(filepath.Join(dir, root.Name()+".fish"), true)
		},
	} {
		dir := filepath.Join(share, path)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := generate(dir); err != nil {
			return err
		}
	}
	return nil
}
