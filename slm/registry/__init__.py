"""The Model Registry: names and tags, versions, who becomes champion, and turns among runs."""
